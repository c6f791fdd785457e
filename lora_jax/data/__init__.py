"""Chat rows from files to training batches; numpy only until the first batch is asked for."""

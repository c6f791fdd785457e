"""The jaxpr walk: a traced function run with low-rank products where weights are used."""

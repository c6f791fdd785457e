"""The jaxpr walker: runs a traced function with low-rank products where adapted weights are used."""

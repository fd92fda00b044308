"""The OpenAPI 3.1 document: one entry for each route, its schemas taken from the models that parse and shape."""

"""The HTTP layer below the routes: server, middleware, headers, bodies, errors."""

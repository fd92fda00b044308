"""HTTP only: routes by subject, the layer around them, and what clients see."""

"""HTTP only: routes by subject, the edge around them, and what clients see."""

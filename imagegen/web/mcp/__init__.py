"""Model Context Protocol: the tools of agents at POST /mcp. https://modelcontextprotocol.io/specification/2026-07-28"""

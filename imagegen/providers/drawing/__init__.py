"""The images of the sandbox: scenes, letters, bytes. Imports Pillow, so import it late."""

"""The Jupyter server's side: authenticated handlers over the service."""

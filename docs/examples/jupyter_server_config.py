"""A Jupyter server behind the nginx of nginx.conf beside this file, on the same machine."""

# ruff: noqa: F821, INP001  whoever reads this file provides get_config

c = get_config()

# Only the proxy reaches it, so far as other programs of this machine are kept from it.
c.ServerApp.ip = "127.0.0.1"
c.ServerApp.port = 8888
c.ServerApp.port_retries = 0
c.ServerApp.open_browser = False

# The name under which browsers come; any other is refused, which ends DNS rebinding.
c.ServerApp.local_hostnames = ["localhost", "jupyter.example.org"]

# The client's address and https, from the headers that the proxy sets. Only behind a proxy that
# replaces what clients send: without one, anybody could write any address into the ledger.
c.ServerApp.trust_xheaders = True

# What no handler declares open is closed.
c.ServerApp.allow_unauthenticated_access = False

# The session's cookie goes over TLS alone. The server itself speaks plain HTTP and would not say so.
c.IdentityProvider.secure_cookie = True
c.IdentityProvider.cookie_options = {"samesite": "Lax"}

# A crash of the engine must not end everybody's notebooks.
c.ShimmyEngine.isolation = "process"
# As client_max_body_size in nginx.conf, and less than its proxy_read_timeout.
c.ShimmyLimits.max_request_size = "8MB"
c.ShimmyLimits.max_seconds = 1800

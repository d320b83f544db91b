"""The server extension: builds the graph, registers the routes, and closes everything again."""

from __future__ import annotations

import ipaddress
import os
import secrets
from collections.abc import Callable
from typing import Any, ClassVar

from jupyter_server.extension.application import ExtensionApp
from traitlets import TraitError

from ..compose import build_service
from ..config import CONFIGURABLES, AppTraits, Settings, load_system_config, settings
from ..errors import Misconfigured
from ..health import Surroundings
from ..service import CompletionService
from .events import announce
from .handlers import ROUTES
from .metrics import METRICS
from .redact import keep_secrets


def listens_beyond(server: Any) -> str | None:
    """Where a server listens besides this machine's own addresses, or None. A name other than localhost
    may mean any address.
    """
    if server.sock or server.ip == "localhost":
        return None
    try:
        loopback = ipaddress.ip_address(server.ip).is_loopback
    except ValueError:
        loopback = False
    return None if loopback else server.ip or "all addresses"


class ShimmyApp(AppTraits, ExtensionApp):
    """A local language model behind Jupyter's own authentication."""

    name = "shimmy_jupyter"
    extension_url = "/shimmy/health"
    load_other_extensions = True
    classes: ClassVar[list[type]] = list(CONFIGURABLES)  # type: ignore[misc]

    service: CompletionService | None = None
    _watching: tuple[Callable[[], None], ...] = ()

    def initialize_settings(self) -> None:
        keep_secrets(self.log.name)
        try:
            chosen = settings(self.config, system=load_system_config())
        except TraitError as error:
            # The server itself goes on; our routes say what is wrong.
            self.log.error("shimmy_jupyter cannot answer, as a setting is wrong: %s", error)  # noqa: TRY400
            self.settings["shimmy_service"] = Misconfigured(str(error))
            chosen = Settings()
        else:
            where = listens_beyond(self.serverapp)
            if chosen.bind_localhost_only and where is not None:
                said = (
                    f"this server listens on {where}, and ShimmyApp.bind_localhost_only is set; "
                    "start it with --ServerApp.ip=localhost, or unset that"
                )
                self.log.error("shimmy_jupyter does not answer: %s", said)
                self.settings["shimmy_service"] = Misconfigured(said)
            else:
                self.service = build_service(chosen)
                self.settings["shimmy_service"] = self.service
                self.watch()
        self.settings["shimmy_surroundings"] = Surroundings(
            chosen.state_folder, chosen.memory_reserve
        )
        self.settings["shimmy_max_request_bytes"] = chosen.max_request_bytes

    def initialize_handlers(self) -> None:
        self.handlers.extend(ROUTES)

    async def _start_jupyter_server_extension(self, serverapp: Any) -> None:
        self._hand_kernels_a_secret()

    def _hand_kernels_a_secret(self) -> None:
        """Where only a password guards the server, its kernels inherit a secret of our own."""
        assert self.serverapp is not None
        identity = self.serverapp.identity_provider
        # A server started from inside another's kernel or terminal must not pass on the other's.
        os.environ.pop("SHIMMY_KERNEL_TOKEN", None)
        if identity.auth_enabled and not identity.token and hasattr(identity, "hashed_password"):
            secret = secrets.token_urlsafe(32)
            # The handlers' settings; the extension's own were copied there before this.
            self.serverapp.web_app.settings["shimmy_kernel_secret"] = secret
            os.environ["SHIMMY_KERNEL_TOKEN"] = secret

    def watch(self) -> None:
        """Count and announce what `service` does, and no other's any more."""
        self._unwatch()
        assert self.serverapp is not None
        events = self.serverapp.event_logger
        if self.service is not None and events is not None:
            self._watching = METRICS.attach(self.service), announce(self.service, events)

    def _unwatch(self) -> None:
        for stop in self._watching:
            stop()
        self._watching = ()

    def current_activity(self) -> int:
        """Requests in progress: an idle shutdown must not end them."""
        return self.service.active if self.service is not None else 0

    async def stop_extension(self) -> None:
        web_app = getattr(self.serverapp, "web_app", None)  # there is none where it could not start
        if web_app is not None and web_app.settings.pop("shimmy_kernel_secret", None):
            os.environ.pop("SHIMMY_KERNEL_TOKEN", None)
        try:
            if self.service is not None:
                await self.service.close()
        finally:
            self._unwatch()  # what it ended counts

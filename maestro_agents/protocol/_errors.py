"""Every error that Maestro raises.

MaestroError
├── ConfigError        a setting, file or argument is wrong; the message names the fix
├── UnsupportedError   this object, engine or platform cannot do what was asked
└── BackendError       the backend could not do its part
"""

from __future__ import annotations


class MaestroError(Exception):
    """Root of all errors raised by Maestro."""


class ConfigError(MaestroError):
    """A setting, file or argument is wrong; the message names the fix."""


class UnsupportedError(MaestroError):
    """This object, engine or platform cannot do what was asked."""


class BackendError(MaestroError):
    """The backend could not do its part; the message says what it was doing."""

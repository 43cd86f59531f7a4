"""The error that says what is wrong with a configuration."""


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key, the value and what is allowed.

    ``str()`` puts ``CacheScope configuration:`` in front of the message, which may stand alone in
    the log of a server that has many settings; ``args[0]`` is the message itself.
    """

    def __str__(self) -> str:
        return f"CacheScope configuration: {self.args[0]}"

"""Every registered method meets the contract; a new file in `ssl_core/methods` is tested here by itself."""

from ssl_core.testing.method import MethodContract


class TestMethods(MethodContract):
    pass

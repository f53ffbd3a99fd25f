"""Every registered method meets the contract; a new file in `ssl_core/methods` is tested here by itself."""

from ssl_core.testing.method_contract import MethodContract


class TestMethods(MethodContract):
    pass

"""Run a Python program as on OpenWrt, where the library comes in packages.

    python3 .ci/light.py logging,urllib,... SCRIPT [ARGUMENT ...]

Only python3-light and the packages named first are there. Which module is in
which package: openwrt/packages, lang/python/python3/files.
"""
import os
import runpy
import sys

PACKAGES = {
    'asyncio': 'asyncio', 'ctypes': 'ctypes _ctypes', 'dbm': 'dbm _dbm _gdbm',
    'codecs': 'unicodedata _codecs_cn _codecs_hk _codecs_iso2022 _codecs_jp'
              ' _codecs_kr _codecs_tw',
    'decimal': 'decimal _decimal _pydecimal', 'logging': 'logging',
    'lzma': 'lzma _lzma', 'multiprocessing': 'multiprocessing',
    'openssl': '_ssl _hashlib', 'pydoc': 'pydoc', 'readline': 'readline',
    'sqlite3': 'sqlite3 _sqlite3', 'unittest': 'unittest',
    'urllib': 'urllib email', 'uuid': 'uuid _uuid', 'venv': 'venv',
    'webbrowser': 'webbrowser', 'xml': 'xml pyexpat _elementtree',
    'cgi': 'cgi cgitb', 'distutils': 'distutils', 'lib2to3': 'lib2to3',
}


class Missing:
    """An import hook that finds nothing, and says so first."""

    def __init__(self, present):
        self.modules = {module for package, modules in PACKAGES.items()
                        if package not in present
                        for module in modules.split()}

    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in self.modules:
            raise ModuleNotFoundError('No module named %r' % name, name=name)


def main():
    missing = Missing(sys.argv[1].split(','))
    for name in list(sys.modules):
        if name.partition('.')[0] in missing.modules:
            del sys.modules[name]
    sys.meta_path.insert(0, missing)
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()

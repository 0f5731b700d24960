"""The architecture itself, as the README's For developers tells it."""
import ast
import importlib.util
import os
import re
import statistics
import symtable
import sysconfig
import unittest

import smtpproxy

TOP = os.path.dirname(os.path.abspath(smtpproxy.__file__))
CODE = ('smtpproxy.py', 'smtps.py', 'MailHandler.py')
LONGEST, MEDIAN = 45, 10        # lines of a function
CLASS, NAMES = 300, 15          # lines of a class; public names it shows
STEPS = 12                      # of a mail's journey, in README.md
VALUES = {'Mail'}               # their attributes are data: what is stored
SHAPES = {'config': smtpproxy.Config, 'logging': smtpproxy.Logging,
          'account': smtpproxy.Account}
BANNER = re.compile(r'# --- .*')
LAZY = {'ssl', 'smtplib', 'poplib', 'email', 'json', 'urllib', 'http'}
STDLIB = sysconfig.get_paths()['stdlib']


def read(name):
    with open(os.path.join(TOP, name), encoding='utf-8') as file:
        return file.read()


def functions(name):
    """{name and line: length} of all functions of a file."""
    return {'%s:%d %s' % (name, node.lineno, node.name):
            node.end_lineno - node.lineno + 1
            for node in ast.walk(ast.parse(read(name)))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def imports(name):
    """The top-level modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(read(name))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add('.' * node.level + (node.module or ''))
    return {module.partition('.')[0] for module in found}


def is_standard(module):
    origin = importlib.util.find_spec(module).origin or 'built-in'
    return origin in ('built-in', 'frozen') or (
        origin.startswith(STDLIB) and 'site-packages' not in origin)


class Sections(unittest.TestCase):
    """Of smtpproxy.py: each uses only what stands above it."""

    def setUp(self):
        self.source = read('smtpproxy.py')
        self.starts = [number for number, line in enumerate(
            self.source.splitlines(), 1) if BANNER.match(line)]

    def section(self, line):
        """The number of the section that a line is in."""
        return sum(start <= line for start in self.starts)

    def definitions(self):
        """{name: section} of all that is defined at the top level."""
        found = {}
        for node in ast.parse(self.source).body:
            names = [node.name] if hasattr(node, 'name') else [
                name.id for name in ast.walk(node) if isinstance(
                    name, ast.Name) and isinstance(name.ctx, ast.Store)]
            for name in names:
                found.setdefault(name, self.section(node.lineno))
        return found

    def uses(self, table):
        """(name, line of the function) of global names in functions."""
        for scope in table.get_children():
            if scope.get_type() == 'function':
                for symbol in scope.get_symbols():
                    if symbol.is_global() and symbol.is_referenced():
                        yield symbol.get_name(), scope.get_lineno()
            yield from self.uses(scope)

    def test_the_file_reads_from_top_to_bottom(self):
        defined = self.definitions()
        table = symtable.symtable(self.source, 'smtpproxy.py', 'exec')

        early = sorted({
            'line %d uses %s of section %d' % (line, name, defined[name])
            for name, line in self.uses(table)
            if defined.get(name, 0) > self.section(line)})

        self.assertEqual([], early)
        self.assertGreater(len(defined), 50)

    def test_the_docstring_lists_the_sections(self):
        listed = ' '.join(smtpproxy.__doc__.split())

        for line in self.source.splitlines():
            if BANNER.match(line):
                name = line[6:].partition(':')[0].strip(' -')
                with self.subTest(name):
                    self.assertIn(name, listed)

    def test_banners_fill_the_line(self):
        for name in CODE:
            for line in filter(BANNER.match, read(name).splitlines()):
                with self.subTest(line):
                    self.assertRegex(line, r'^# --- .*[^-] -+$')
                    self.assertGreaterEqual(len(line), 78)


class Size(unittest.TestCase):

    def test_functions_are_small(self):
        for name in CODE:
            with self.subTest(name):
                sizes = functions(name)
                self.assertEqual({}, {function: size for function, size
                                      in sizes.items() if size > LONGEST})
                self.assertLessEqual(statistics.median(sizes.values()),
                                     MEDIAN)

    def test_no_line_is_longer_than_a_terminal(self):
        for name in CODE:
            for number, line in enumerate(read(name).splitlines(), 1):
                if len(line) > 79:
                    with self.subTest(name):
                        self.fail('line %d: %s' % (number, line))


def classes(name):
    """[ast.ClassDef] of a file."""
    return [node for node in ast.walk(ast.parse(read(name)))
            if isinstance(node, ast.ClassDef)]


def is_named_tuple(node):
    return 'NamedTuple' in [getattr(base, 'id', '') for base in node.bases]


def public_names(node):
    """What a class shows: methods and attributes, its own and of self."""
    found = {item.name for item in node.body if hasattr(item, 'name')}
    if node.name in VALUES:
        return {name for name in found if not name.startswith('_')}
    for part in ast.walk(node):
        if not isinstance(getattr(part, 'ctx', None), ast.Store):
            continue
        if isinstance(part, ast.Attribute) and (
                getattr(part.value, 'id', '') == 'self'):
            found.add(part.attr)
    for item in node.body:
        for part in getattr(item, 'targets', ()):
            found.update(name.id for name in ast.walk(part)
                         if isinstance(name, ast.Name))
    return {name for name in found if not name.startswith('_')}


def nouns(name):
    """{class: its duty} of the list in a file's docstring: names and commas,
    two blanks or more, the duty."""
    found = {}
    for line in ast.get_docstring(ast.parse(read(name))).splitlines():
        match = re.match(r' {4}((?:\w+, )*\w+),? {2,}(\S.*)', line)
        if match:
            found.update(dict.fromkeys(match[1].split(', '), match[2]))
    return found


class Classes(unittest.TestCase):

    def test_a_class_is_read_in_one_go(self):
        for name in CODE:
            for node in classes(name):
                with self.subTest(node.name):
                    self.assertLessEqual(
                        node.end_lineno - node.lineno + 1, CLASS)

    def test_a_class_shows_few_names(self):
        for name in CODE:
            for node in classes(name):
                if not is_named_tuple(node):        # these are data
                    with self.subTest(node.name):
                        names = public_names(node)
                        self.assertLessEqual(len(names), NAMES, names)

    def test_every_class_is_a_noun_with_a_duty(self):
        for name in CODE[:2]:
            with self.subTest(name):
                self.assertEqual(
                    sorted(node.name for node in classes(name)),
                    sorted(noun for noun in nouns(name)
                           if noun[0].isupper() and not noun.isupper()
                           and noun != 'None'))


class Journey(unittest.TestCase):
    """README.md tells what becomes of a mail; the code agrees."""

    def steps(self):
        """[(function, thread)] of the numbered list."""
        text = read('README.md').partition('journey of a mail')[2]
        return re.findall(r'^\d+\. .*?`([\w.]+)` \(([\w-]+)\)', text, re.M)

    def defined(self):
        """'smtps.Class._method', 'Class.method', 'function' of all code."""
        found = set()
        for file, prefix in ('smtps.py', 'smtps.'), ('smtpproxy.py', ''):
            for node in ast.parse(read(file)).body:
                if hasattr(node, 'name'):
                    found.add(prefix + node.name)
                for part in getattr(node, 'body', ()):
                    if isinstance(part, ast.FunctionDef):
                        found.add('%s%s.%s' % (prefix, node.name, part.name))
        return found

    def test_every_step_names_a_function_that_is_there(self):
        defined, steps = self.defined(), self.steps()

        self.assertEqual([], [f for f, _ in steps if f not in defined])
        self.assertIn(len(steps), range(8, STEPS + 1))

    def test_every_step_names_a_thread_that_is_there(self):
        code = read('smtps.py') + read('smtpproxy.py')
        for function, thread in self.steps():
            with self.subTest(function):
                self.assertIn("'%s'" % thread.replace('SERVER', ''), code)


class Imports(unittest.TestCase):

    def test_nothing_but_the_standard_library(self):
        ours = {'smtpproxy.py': {'smtps', 'MailHandler'}}
        for name in CODE:
            for module in imports(name) - ours.get(name, set()):
                with self.subTest('%s: %s' % (name, module)):
                    self.assertTrue(is_standard(module))

    def test_the_library_knows_nothing_of_the_program(self):
        self.assertEqual(set(), imports('smtps.py') & {
            'smtpproxy', 'MailHandler', 'configparser', 'poplib'})

    def test_what_costs_memory_is_imported_where_it_is_needed(self):
        for name in CODE:
            at_once = {alias.name for node in ast.parse(read(name)).body
                       if isinstance(node, ast.Import)
                       for alias in node.names}
            with self.subTest(name):
                self.assertEqual(set(), at_once & LAZY)

    def test_the_base_of_handlers_needs_only_abc(self):
        self.assertEqual({'abc'}, imports('MailHandler.py'))


class Threads(unittest.TestCase):

    def test_every_thread_has_a_name(self):
        for name in CODE + ('tests/fakes.py',):
            for call in ast.walk(ast.parse(read(name))):
                if isinstance(call, ast.Call) and 'Thread' in (
                        getattr(call.func, 'attr', ''),
                        getattr(call.func, 'id', '')):
                    with self.subTest('%s:%d' % (name, call.lineno)):
                        self.assertIn('name', [k.arg for k in call.keywords])


class Keys(unittest.TestCase):
    """Code, ini.example and README know the same keys and defaults."""

    def setUp(self):
        self.defaults = {name: {
            key: self.written(value)
            for key, value in shape._field_defaults.items()}
            for name, shape in SHAPES.items()}
        self.defaults['account']['smtpport'] = '25'     # 465 with ssl

    @staticmethod
    def written(value):
        return str(value).lower() if isinstance(value, bool) else str(value)

    def example(self, pattern):
        """{kind of section: {key: value}} of the lines like pattern."""
        found, kind = {name: {} for name in SHAPES}, ''
        for line in read('smtpproxy.ini.example').splitlines():
            section = re.match(r'#?\[(\w*)', line)
            if section:
                kind = section[1] if section[1] in (
                    'config', 'logging', 'handler') else 'account'
            match = re.match(pattern + r'([a-z]+)=(.*)', line)
            if match and kind != 'handler':
                found[kind][match[1]] = match[2]
        return found

    def readme(self):
        """The same of the tables in README.md."""
        found = []
        for line in read('README.md').splitlines():
            cells = [cell.strip(' `') for cell in line.split('|')[1:-1]]
            if cells[:2] == ['key', 'default']:
                found.append({})
            elif found and len(cells) == 3 and cells[0].isalnum():
                found[-1].setdefault(cells[0], cells[1])
            elif found and found[-1] and not cells:
                found.append({})
        return dict(zip(SHAPES, filter(None, found)))

    def test_the_readme_explains_every_key_and_its_default(self):
        readme = self.readme()

        for kind, defaults in self.defaults.items():
            with self.subTest(kind):
                self.assertEqual(defaults, readme[kind])

    def test_the_readme_names_the_largest_of_every_number(self):
        for shape in SHAPES.values():
            for key, kind in shape.__annotations__.items():
                if isinstance(kind, smtpproxy.Number) and 'port' not in key:
                    with self.subTest(key):
                        self.assertRegex(read('README.md'), (
                            r'(?m)^\| %s \| .*\b%d\b' % (key, kind.most)))

    def test_the_example_shows_every_key(self):
        shown = self.example('#?')

        for kind, defaults in self.defaults.items():
            with self.subTest(kind):
                self.assertEqual(sorted(defaults), sorted(shown[kind]))

    def test_the_example_shows_every_default(self):
        shown = self.example('#')

        for kind, defaults in self.defaults.items():
            with self.subTest(kind):
                self.assertEqual(defaults, shown[kind])

    def test_the_example_is_a_valid_ini(self):
        settings = smtpproxy.load(
            os.path.join(TOP, 'smtpproxy.ini.example'))

        self.assertFalse(settings.config.deleteonerror)

    def test_a_copied_example_sends_nothing_to_placeholders(self):
        self.assertEqual({}, smtpproxy.load(
            os.path.join(TOP, 'smtpproxy.ini.example')).accounts)


if __name__ == '__main__':
    unittest.main()

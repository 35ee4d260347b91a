"""The house: functions that fit on a page, imports that run down only and in no circle, a short front, short lines."""
import ast
import os

from conftest import ROOT

MAX_FUNCTION_LINES = 60
MAX_COLUMNS = 120
MAX_ROOT_FILES = 20

# Floors from the ground up: a file imports from floors below its own, and from its own room. A stage, a script at the
# root that is none of these, is a room for itself: stages meet through files.
FLOORS = (('configurator',), ('corpus', 'model'), ('training',), ('sparse', 'score'), ('codec',), ('stages',), ('lab',))
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FOLDERS = ('corpus', 'training', 'codec', 'lab', 'config', 'tests', 'slurm', 'docs')


class File:
    """A Python file of the repository: its path below the root, lines and syntax tree."""

    def __init__(self, path):
        self.path = path
        with open(os.path.join(ROOT, path), encoding='utf-8') as f:
            text = f.read()
        self.lines = text.split('\n')
        self.tree = ast.parse(text)

    @property
    def module(self):
        """The name by which others import it; a folder's __init__.py has the folder's."""
        return self.path.removesuffix('.py').removesuffix('/__init__').replace(os.sep, '.')

    @property
    def room(self):
        first = self.path.split(os.sep)[0].removesuffix('.py')
        return first if first in FLOOR_OF else 'stages'

    def imports(self):
        """Yield (line, dotted name) of all imports, those inside functions as well; `from a import b` gives a.b."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node.lineno, alias.name
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f'{self.path}:{node.lineno}: a relative import'
                for alias in node.names:
                    yield node.lineno, f'{node.module}.{alias.name}'


def read_files():
    """Return all Python files at the root and in its folders, not what a user has beside them."""
    paths = [name for name in os.listdir(ROOT) if name.endswith('.py')]
    for folder in FOLDERS:
        for where, _, names in os.walk(os.path.join(ROOT, folder)):
            paths += [os.path.relpath(os.path.join(where, name), ROOT) for name in names if name.endswith('.py')]
    return [File(path) for path in sorted(paths)]


FILES = read_files()
CODE = [file for file in FILES if file.path.split(os.sep)[0] not in ('config', 'tests')]
MODULES = {file.module: file for file in CODE}


def edges():
    """Yield (file, line, imported file) of all imports between files of the house."""
    for file in CODE:
        for line, name in file.imports():
            while name and name not in MODULES:             # a name in a module stands for the module
                name = name.rpartition('.')[0]
            if name and MODULES[name] is not file:
                yield file, line, MODULES[name]


def assert_none(offenders, rule):
    assert not offenders, f'{len(offenders)} against "{rule}":\n' + '\n'.join(offenders)


def test_functions_fit_on_a_page():
    """What is longer is not held in the head; a method counts like a function, its decorators and comments do too."""
    offenders = []
    for file in FILES:
        for node in ast.walk(file.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                n_lines = node.end_lineno - node.lineno + 1
                if n_lines > MAX_FUNCTION_LINES:
                    offenders.append(f'{file.path}:{node.lineno}: {node.name} has {n_lines} lines')
    assert_none(offenders, f'functions have at most {MAX_FUNCTION_LINES} lines')


def test_imports_run_down_only():
    """What lies below can be read without what stands on it."""
    offenders = []
    for file, line, other in edges():
        same_room = file.room == other.room != 'stages'
        if not same_room and FLOOR_OF[other.room] >= FLOOR_OF[file.room]:
            offenders.append(f'{file.path}:{line}: {file.room} imports {other.module} ({other.room})')
    assert_none(offenders, 'imports run down: ' + ' → '.join(', '.join(rooms) for rooms in FLOORS))


def test_imports_have_no_circle():
    """Two files that need each other are one thing; an import inside a function only hides that."""
    below = {file.module: set() for file in CODE}
    for file, _, other in edges():
        below[file.module].add(other.module)

    # Take away what needs nothing that is left, until all is gone or only circles (and what needs them) remain; then
    # the same from the other side, so that only circles remain.
    while free := [name for name, needs in below.items() if not needs & below.keys()]:
        for name in free:
            del below[name]
    while unneeded := below.keys() - set().union(*below.values()):
        for name in unneeded:
            del below[name]
    assert_none([f'{name} → {", ".join(sorted(needs & below.keys()))}' for name, needs in below.items()],
                'no circles of imports')


def test_the_front_is_short():
    """`ls` shows things to type and nouns that everybody needs."""
    names = [file.path for file in FILES if os.sep not in file.path]
    assert len(names) <= MAX_ROOT_FILES, f'{len(names)} files at the root: ' + ', '.join(names)


def test_lines_are_short():
    """Code that is folded by the editor is not read."""
    offenders = [f'{file.path}:{i}: {len(line)} columns' for file in FILES
                 for i, line in enumerate(file.lines, 1) if len(line) > MAX_COLUMNS]
    assert_none(offenders, f'lines have at most {MAX_COLUMNS} columns')


# --- tests ---

class TestFile:
    """The functions of a test file, and which of them are tests that start processes but are not marked as slow."""

    __test__ = False
    STARTERS = ('run_script', 'torchrun', 'peak_memory', 'Popen')

    def __init__(self, file):
        self.file = file
        functions = [node for node in file.tree.body if isinstance(node, ast.FunctionDef)]
        self.functions = {node.name: node for node in functions}
        self.starting = {node.name for node in functions if self.starts_a_process(node)}

        # Who calls a helper that starts one, or asks for a fixture that does, starts one as well.
        before = -1
        while len(self.starting) > before:
            before = len(self.starting)
            self.starting |= {node.name for node in functions if self.names_in(node) & self.starting}

    def starts_a_process(self, function):
        for call in ast.walk(function):
            if isinstance(call, ast.Call):
                name = ast.unparse(call.func)
                if name.split('.')[-1] in self.STARTERS:
                    return True
                if name == 'subprocess.run' and "'git'" not in ast.unparse(call):
                    return True
        return False

    def names_in(self, function):
        names = {argument.arg for argument in function.args.args}
        return names | {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}

    def offenders(self):
        marks = [ast.unparse(node) for node in self.file.tree.body if isinstance(node, ast.Assign)]
        if any(mark.startswith('pytestmark') and 'pytest.mark.slow' in mark for mark in marks):
            return []
        found = [self.functions[name] for name in sorted(self.starting) if name.startswith('test_')]
        return [f'{self.file.path}:{node.lineno}: {node.name}' for node in found
                if 'pytest.mark.slow' not in map(ast.unparse, node.decorator_list)]


def test_what_starts_processes_is_marked_as_slow():
    """`make check` is run before every commit: each new interpreter that loads torch costs it seconds."""
    files = [TestFile(file) for file in FILES if os.path.basename(file.path).startswith('test_')]
    assert_none([line for file in files for line in file.offenders()], 'tests that start processes are marked as slow')
    assert sum(len(file.starting) for file in files) > 20


def test_the_rooms_are_found():
    """A test of imports that finds none would pass for ever."""
    assert {file.room for file in CODE} == FLOOR_OF.keys()
    found = {(file.path, other.module) for file, _, other in edges()}
    assert {('train.py', 'training.run'), ('training/step.py', 'training.parallel'), ('sparse.py', 'model')} <= found
    inside_functions = {('training/checkpoint.py', 'model'), ('training/plan.py', 'model')}
    assert inside_functions <= found

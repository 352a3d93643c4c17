"The course: pages are what their sources give, solutions earn full marks, stubs wait for an answer."

import importlib.util
import json
import re

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location('course', ROOT / 'tools/course.py')
course = importlib.util.module_from_spec(spec)
spec.loader.exec_module(course)
SOURCES = sorted((ROOT / 'nbs/course/_source').glob('*.ipynb'))
each_lesson = pytest.mark.parametrize('source', SOURCES, ids=lambda p: p.stem)


def cell(kind, code):
    out = dict(cell_type=kind, id='c', metadata={}, source=code.splitlines(keepends=True))
    return out | (dict(outputs=['old'], execution_count=None) if kind == 'code' else {})


SMALL = [
    cell('markdown', '# A lesson\n\n> Its line'),
    cell('code', '#| eval: false\n! pip'),
    cell('code', 'import math\nfrom a import unused, c'),
    cell('code', 'x = 1'),
    cell('markdown', '## Exercise 1'),
    cell('code', '#| exercise\nE = math.pi + c'),
    cell('code', '#| solution\ndef f(\n    a,  # a number\n):\n    "Twice."\n    b = 2\n    return b * a'),
    cell('code', '#| solution\nanswers = {1: "a"}'),
    cell('markdown', '## Further reading'),
    cell('markdown', 'A book.'),
]


def test_a_lesson_has_stubs():
    got = [course.text(c) for c in course.lesson(SMALL)]
    assert got[6] == 'def f(\n    a,  # a number\n):\n    "Twice."\n    ...  # your turn'
    assert got[7] == 'answers = {}  # your turn' and got[5] == 'E = math.pi + c'
    assert len(got) == len(SMALL) and got[:5] == [course.text(c) for c in SMALL[:5]]
    assert [c['outputs'] for c in course.lesson(SMALL) if c['cell_type'] == 'code'] == [[]] * 6


def test_solutions_hold_the_exercises_alone():
    got = [course.text(c) for c in course.solutions(SMALL)]
    assert got[0].startswith('# Solutions: A lesson\n\n> ')
    kept = ['#| eval: false\n! pip', 'import math\nfrom a import c', '## Exercise 1', 'E = math.pi + c']
    assert got[1:5] == kept and len(got) == 7
    assert got[5].endswith('return b * a') and got[6] == 'answers = {1: "a"}'


@pytest.mark.parametrize('code', ['x = 1', 'def f(x):\n    return x', 'print(1)'])
def test_a_solution_that_has_no_stub_is_an_error(code):
    with pytest.raises(ValueError, match='neither a function'):
        course.stub(code)


def test_outputs_are_kept_where_code_is_the_same(tmp_path, monkeypatch):
    from nbdev import clean

    monkeypatch.setattr(clean.nbdev_clean, '__wrapped__', lambda fname: None)
    monkeypatch.setattr(course, 'execute', lambda cells: cells[0].update(outputs=['new']))
    page = tmp_path / 'x.ipynb'
    cells = [cell('code', 'x = 1'), cell('markdown', 'text')]
    assert course.write(page, [c | dict(outputs=[]) for c in cells])
    assert not course.write(page, [cells[0] | dict(outputs=[]), cell('markdown', 'other text')])
    there = json.loads(page.read_text())['cells']
    assert there[0]['outputs'] == ['new'] and there[1]['source'] == ['other text']
    assert course.write(page, [cell('code', 'x = 2')])


@each_lesson
def test_pages_are_what_their_source_gives(source):
    for path, cells in course.derived(source).items():
        there = json.loads(path.read_text(encoding='utf-8'))['cells']
        shown = [(c['cell_type'], c['id'], course.text(c)) for c in there]
        assert shown == [(c['cell_type'], c['id'], course.text(c)) for c in cells], (
            f'{path.name} is not what {source.name} gives: run python tools/course.py derive {source.stem}'
        )


def test_every_page_has_its_source():
    pages = {p for source in SOURCES for p in course.derived(source)}
    assert pages == set((ROOT / 'nbs/course').glob('*.ipynb'))


@each_lesson
def test_a_source_keeps_no_outputs(source):
    cells = json.loads(source.read_text(encoding='utf-8'))['cells']
    assert not any(c['outputs'] for c in cells if c['cell_type'] == 'code')
    assert len({c['id'] for c in cells}) == len(cells)


def checked(cells, monkeypatch, tmp_path, seeds=None):
    "The marks of each check, with the code run in this process."
    from lus_fastai import exercises

    marks = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exercises, 'ANSWERS', exercises.AnswerLog())
    for kind in (exercises.Exercise, exercises.Quiz):
        check = kind.check

        def keep(self, *args, check=check, **kw):
            if seeds and 'seeds' not in kw and isinstance(self, exercises.Exercise):
                kw['seeds'] = seeds
            marks.append(check(self, *args, **kw))
            return marks[-1]

        monkeypatch.setattr(kind, 'check', keep)
    names = {}
    for c in cells:
        if c['cell_type'] == 'code' and 'eval: false' not in course.text(c):
            exec(course.text(c), names)
    return marks


@each_lesson
def test_solutions_earn_full_marks_and_stubs_wait(source, monkeypatch, tmp_path):
    cells = json.loads(source.read_text(encoding='utf-8'))['cells']
    solved = course.solutions(cells)
    marks = checked(solved, monkeypatch, tmp_path)
    assert len(marks) >= 4 and [repr(m) for m in marks if m.score < 1] == []
    waiting = course.solutions(course_with_stubs(cells))
    marks = checked(waiting, monkeypatch, tmp_path, seeds=range(2))
    assert [repr(m) for m in marks if m.answered] == []


def course_with_stubs(cells):
    "The source with each solution replaced by its stub, still marked so that its page keeps it."
    stubs = course.lesson(cells)
    return [
        s | dict(source='#| exercise\n' + course.text(s)) if c['cell_type'] == 'code' and kept(c) else s
        for c, s in zip(cells, stubs)
    ]


def kept(c):
    return course.marked(c, 'solution') or course.marked(c, 'exercise')


@each_lesson
def test_a_saved_lesson_waits_and_its_saved_solutions_are_right(source):
    lesson, solved = (
        [
            json.dumps(c['outputs'])
            for c in json.loads(p.read_text(encoding='utf-8'))['cells']
            if 'outputs' in c
        ]
        for p in course.derived(source)
    )
    waiting, whole = (sum('not answered yet' in o for o in page) for page in (lesson, solved))
    right = [m for o in solved for m in re.findall(r'<strong>[^<]*: (\d+) of (\d+) right', o)]
    assert whole == 0 and len(right) == waiting >= 4 and all(a == b for a, b in right)
    assert not any(re.search(r'\d+ of \d+ right', o) for o in lesson)


@each_lesson
def test_a_lesson_has_its_parts(source):
    cells = json.loads(source.read_text(encoding='utf-8'))['cells']
    words = '\n'.join(course.text(c) for c in cells if c['cell_type'] == 'markdown')
    for part in ('**Goals.**', '**Before.**', '**Time.**', 'works on a CPU'):
        assert part in words, f'{source.name} lacks {part}'
    heads = re.findall(r'^## (.+)', words, re.M)
    assert 'Quiz' in heads and heads[-2:] == ['Further reading', 'Where next']
    assert 3 <= sum(h.startswith('Exercise ') for h in heads) <= 5
    assert words.count('**Predict.**') >= 2

"What the notebook of exercises does not own: odd answers, odd functions, other sessions, what is shown."

import json

import numpy as np
import pytest
import torch

from lus_fastai import exercises as E


@pytest.fixture(autouse=True)
def log(monkeypatch):
    monkeypatch.setattr(E, 'ANSWERS', E.AnswerLog())


double = E.Exercise('double', 'twice', lambda seed: seed, lambda x: 2 * x)


@pytest.mark.parametrize(
    'answer, truth, same',
    [
        (True, True, True),
        (1, True, True),
        ('1', 1, False),
        ({1, 2}, {2, 1}, True),
        (torch.tensor([1.0, 2.0]), [1, 2], True),
        (np.nan, 1.0, False),
        ([1, 2, 3], [1, 2], False),
        (None, 0, False),
    ],
)
def test_what_is_the_same(answer, truth, same):
    assert E.same_answer(answer, truth) is same


def test_some_answers_missing_is_wrong_and_all_missing_waits():
    marks = double.check(lambda x: None if x == 3 else 2 * x, seeds=range(5), confidence=1)
    assert marks.answered and marks.score == 0.8 and E.ANSWERS.rows[0]['right'] is False
    assert 'seed 3: the function gave None, the answer is 6' in repr(marks)
    assert not double.check(lambda x: None, confidence=0.5).answered and len(E.ANSWERS.rows) == 1


def test_an_error_names_its_seed_and_what_was_raised():
    marks = double.check(lambda x: 2 * x if x < 4 else {}['gone'], seeds=range(6))
    assert marks.score == 4 / 6 and "seed 4: the function raised KeyError: 'gone'" in repr(marks)


def test_a_rule_that_cannot_read_an_answer_is_an_error_of_the_answer():
    near = E.Exercise('near', '', lambda s: s, lambda x: x, E.within(1))
    assert set(near.check(lambda x: 'five').rows.mark) == {'error'}


def test_a_function_that_writes_into_its_question_changes_no_truth():
    total = E.Exercise('sum', '', lambda s: np.arange(s + 3), lambda x: x.sum())

    def spoil(x):
        answer = x.sum()
        x[:] = 0
        return answer

    assert total.check(spoil).score == 1


def test_a_tuple_is_several_arguments():
    add = E.Exercise('add', '', lambda s: (s, 2), lambda a, b: a + b)
    assert add.check(lambda a, b: a + b).score == 1


def test_html_escapes_what_a_learner_gives():
    marks = double.check(lambda x: '<b>', seeds=range(2))
    assert '&lt;b&gt;' in marks._repr_html_() and '<b>' not in marks._repr_html_()


def test_choices_are_shuffled_the_same_way_each_time_and_not_always_alike():
    asked = [E.Question(f'question {i}', ['yes', 'no', 'perhaps'], 'so') for i in range(30)]
    keys = [q.key for q in asked]
    assert set(keys) == set('abc') and keys == [q.key for q in asked]
    assert all(q.shuffled[q.key] == 'yes' and sorted(q.shuffled.values()) == sorted(q.choices) for q in asked)
    quiz = E.Quiz(asked)
    assert quiz.check(quiz.key, confidence=dict.fromkeys(quiz.key, 0.9)).score == 1
    assert len(E.ANSWERS.first()) == 30


def test_the_curve_is_not_folded_at_one_half():
    for i in range(10):
        E.ANSWERS.add(f'a{i}', 0.1, False)
    ax = E.confidence_curve(E.ANSWERS).axes[0]
    x, y = ax.lines[1].get_data()
    assert list(x) == pytest.approx([0.1]) and list(y) == [0]


def test_a_log_goes_on_in_its_file(tmp_path):
    path = tmp_path / 'mine.json'
    E.ANSWERS.add('before', 0.5, True)
    E.ANSWERS.keep(path)
    other = E.AnswerLog()
    other.keep(path)
    other.add('after', 0.6, False)
    assert [r['name'] for r in json.loads(path.read_text())] == ['before', 'after']


@pytest.mark.parametrize('confidence', [-0.1, 80, float('nan')])
def test_a_confidence_is_a_probability(confidence):
    with pytest.raises(ValueError, match='from 0'):
        double.check(lambda x: x, confidence=confidence)
    with pytest.raises(ValueError, match='from 0'):
        double.check(lambda x: None, confidence=confidence)  # not answered yet
    assert E.ANSWERS.rows == []


def test_a_confidence_in_a_quiz_is_checked_without_an_answer():
    quiz = E.Quiz([E.Question('which', ['this', 'that'], 'so')])
    with pytest.raises(ValueError, match='from 0'):
        quiz.check({}, confidence={1: 90})
    assert E.ANSWERS.rows == []


@pytest.mark.parametrize(
    'answer, shown',
    [([], 'an empty list'), ([(0, 6), (1, 9)], '(0, 6), (1, 9)'), ((1, 2.5), '1, 2.5'), ([3], '3')],
)
def test_lists_are_shown_with_their_parts(answer, shown):
    marks = E.Exercise('pairs', '', lambda s: s, lambda x: 'true').check(lambda x: answer, seeds=[0])
    assert f'seed 0: answered {shown}, the answer is true' in repr(marks)

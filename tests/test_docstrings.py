"""All docstring examples give the results that they show."""

import doctest
import importlib
import pkgutil

import pytest

import optclip

MODULES = ["optclip"] + [
    found.name
    for found in pkgutil.walk_packages(optclip.__path__, "optclip.")
    if not found.name.endswith("__main__")
]


def holds_examples(name):
    found = doctest.DocTestFinder().find(importlib.import_module(name))
    return any(test.examples for test in found)


@pytest.mark.parametrize("module", [*filter(holds_examples, MODULES)])
def test_docstring_examples_run(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted
    assert not result.failed

import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.text.template import Field, Literally, Templates, parse


def test_pieces_keep_every_space_and_line_break():
    pieces = parse(" {prompt}\n\nA: {reference} ", ("prompt", "reference"), "t")
    assert pieces == (
        Literally(" "),
        Field("prompt"),
        Literally("\n\nA: "),
        Field("reference"),
        Literally(" "),
    )


def test_doubled_braces_are_braces_and_do_not_cut_a_literal():
    assert parse('{{"a": 1}}{prompt}', ("prompt",), "t") == (Literally('{"a": 1}'), Field("prompt"))


@pytest.mark.parametrize(
    ("field", "template", "rule"),
    [
        ("improver", "{prompt}", "contain {reference}"),
        ("gap", "{reference}", "contain {prompt}"),
        ("policy", "{prompt} {reference}", "use only {prompt}"),
        ("gap", "{prompt}{refrence}", "Did you mean 'reference'"),
        ("improver", "{prompt}{reference}{prompt}", "use each field once"),
        ("policy", "{prompt!r}", "without formats"),
        ("policy", "{prompt:>10}", "without formats"),
        ("policy", "{prompt", "matching braces"),
        ("policy", "{}{prompt}", "use only {prompt}"),
    ],
)
def test_mistakes_are_named_with_their_template(field, template, rule):
    with pytest.raises(ConfigError, match=rf"Templates\.{field}") as error:
        Templates(**{field: template})
    assert rule in str(error.value)


def test_unknown_kind_is_named():
    with pytest.raises(ConfigError, match="Did you mean 'improver'"):
        Templates().pieces("improvr")

"""Labels, names and text of other people, in folders and on pages."""

import html.parser
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ptqd import InputError
from ptqd.experiments.report.rendering import cell, environment, latex_text, markdown_cell, plot_text
from ptqd.names import check_label, folder_name, inside, label_of, natural_key, shown

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300)
HOSTILE = ["../../victim", "..", ".", "/etc", "a/b", "a b", "a-b", "[/]", "$x_1^", "\x1b[31m", "a\nb", "模型", "é", "é"]
CONTROLS = ("Cc", "Cs", "Zl", "Zp")


@given(NAMES)
@example("x" * 300)
@example("模" * 300)
@example("%")
def test_a_label_is_a_folder_and_comes_back(label: str) -> None:
    name = folder_name(label)
    assert label_of(name) == label
    for part in name.split("/"):
        assert re.fullmatch(r"[A-Za-z0-9_.+=%-]+", part)
        assert len(part) <= 255
        assert not part.startswith(".")


@given(st.lists(st.sampled_from(HOSTILE) | NAMES, unique=True, min_size=2, max_size=12))
def test_no_two_labels_share_a_folder(labels: list[str]) -> None:
    names = [folder_name(label) for label in labels]
    assert len(set(names)) == len(names)
    for one in names:  # nor is one a folder that another's results are in
        assert not any(other.startswith(f"{one}/") and not other[len(one) :].startswith("%") for other in names)


def test_plain_names_stand_for_themselves() -> None:
    for name in ("w4a8", "w8a4+6+8", "w4a8-best", "cnc+bc", "19.9x", "my_recipe"):
        assert folder_name(name) == name
    with pytest.raises(InputError, match="empty"):
        folder_name("")


@pytest.mark.parametrize("label", ["../x", "a/b", "a\\b", ".hidden", "", "a\nb", "a\0"])
def test_labels_of_foreign_files_are_checked(label: str) -> None:
    with pytest.raises(InputError, match="is no name"):
        check_label(label, "the manifest")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "", "a\0b", "..", "link/x", "a\\..\\b", "x" * 5000]
)
def test_no_path_leaves_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path)
    with pytest.raises(InputError):
        inside(tmp_path / "run", name, "a report")
    assert inside(tmp_path / "run", "a/b.json", "a report") == tmp_path / "run" / "a" / "b.json"


@given(NAMES)
def test_what_is_shown_moves_nothing(name: str) -> None:
    text = shown(name)
    assert not any(unicodedata.category(c) in CONTROLS for c in text)
    assert not set(text) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f")


@given(NAMES)
@example("[/]")
@example("[bold]x[/bold]")
@example("trailing\\")
@example(":smile:")
def test_a_terminal_shows_the_name_and_no_markup(name: str) -> None:
    assert cell(name).plain == shown(name)
    assert not cell(name).spans


class _Cells(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(NAMES)
@example("<script>alert(1)</script>")
@example('"><img src=x onerror=y>')
def test_a_page_shows_the_name_and_no_markup(name: str) -> None:
    parser = _Cells()
    parser.feed(_PAGE.render(name=name))
    parser.close()
    assert parser.tags == ["p"]
    assert parser.text == shown(name) or "\r" in name


_PAGE = environment().from_string('{% autoescape true %}<p title="{{ name }}">{{ name }}</p>{% endautoescape %}')


@given(NAMES)
def test_markdown_and_latex_have_no_markup_of_names(name: str) -> None:
    text = markdown_cell(name)
    assert not re.search(r"(?<!\\)(\\\\)*[|*_`]", text)
    assert "<" not in text
    assert "](" not in text
    assert "\n" not in text
    plain = re.sub(r"\\(text[a-z]+\{\}|[&%$#_{}])|\$\\pm\$", "", latex_text(name))
    assert not set(plain) & set('&%$#_{}\\^~<>|"')


@given(NAMES)
def test_plots_read_no_mathematics(name: str) -> None:
    text = plot_text(name)
    assert not re.search(r"(?<!\\)\$", text)
    assert not text.startswith("_")
    assert len(text) <= 2 * 40


def test_names_are_sorted_as_people_count() -> None:
    names = [f"{i}.png" for i in range(12)]
    assert sorted(sorted(names), key=natural_key) == names

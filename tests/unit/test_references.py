"""What people type, and which files of a repository they mean.

Cases, parsing: each form, each prefix in any case, blanks around; a browser's addresses: the page, with
a file open, its files, blob, resolve, raw, percent-encoded, pull requests; tags in any case; files in
folders; revisions with slashes; other addresses: names kept, made plain, with a secret query; what they
are judged by, as they are written and as servers read them.
Refused, with what to type instead: nothing, Ollama's names and registry, files of this machine, other
schemes, credentials, fragments, addresses of numbers, folders, pages that are none, datasets, one part
of several by URL, no .gguf, paths upwards, also encoded, once or twice, or with what servers drop,
control characters, what is too long.
Choosing: the named one, a named part, what is never meant unless named; by tag: as a word of its own, in
folders, beside UD-; by preference, in order; the only one; none, several, a part missing, no such file
(with the one that was meant), more than twenty, odd part numbers.
Always: `InvalidValue` about "model" or an answer; what is chosen is in the repository, and complete.
"""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.errors import InvalidValue
from shimmy_jupyter.models.fetch_hub import HubFile
from shimmy_jupyter.models.references import (
    PREFERRED,
    HubReference,
    UrlReference,
    choose,
    model_name,
    parse,
)

R = HubReference
SECRET = "?sig=s3cret"
UPWARDS = ("../private/a.gguf", "./a.gguf", "/private/a.gguf", "%2e%2e/private/a.gguf", "%2E./private/a.gguf",
           "x/../../private/a.gguf", "..;/private/a.gguf", "..%3Bx/a.gguf", "..%20/a.gguf", ".../a.gguf",
           "%20/a.gguf", ";x/a.gguf", "..;a.gguf")  # fmt: skip
HIDDEN = (
    "..%2Fprivate%2Fa.gguf",
    "..%2fprivate/a.gguf",
    "..%5Cprivate/a.gguf",
    "a%00/b.gguf",
    "a%0A.gguf",
)
TWICE = ("%252e%252e/private/a.gguf", "%25%32%65%25%32%65/a.gguf", "%%32e/a.gguf", "%u002e/a.gguf", "a%.gguf",
         "a%2", "..%252fa.gguf")  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("org/name", R("org/name")),
        ("  org/name\n", R("org/name")),
        ("org/name/", R("org/name")),
        ("hf:org/name", R("org/name")),
        ("hf://org/name:q8_0", R("org/name", quantisation="Q8_0")),
        ("hf.co/org/name", R("org/name")),
        ("HF.co/org/name:Q4_K_M", R("org/name", quantisation="Q4_K_M")),
        ("huggingface.co/org/name", R("org/name")),
        ("www.huggingface.co/org/name", R("org/name")),
        ("https://huggingface.co/org/name", R("org/name")),
        ("HTTPS://HuggingFace.co/org/name/", R("org/name")),
        ("https://huggingface.co/org/name:Q4_K_M", R("org/name", quantisation="Q4_K_M")),
        ("https://hf.co/org/name@dev:a/b.gguf", R("org/name", "dev", "a/b.gguf")),
        ("org/name:q4_k_m", R("org/name", quantisation="Q4_K_M")),
        ("org/name:UD-iq2_xxs", R("org/name", quantisation="UD-IQ2_XXS")),
        ("org/name:file.gguf", R("org/name", file="file.gguf")),
        ("org/name:My File (1).GGUF", R("org/name", file="My File (1).GGUF")),
        ("org/name:folder/file.gguf", R("org/name", file="folder/file.gguf")),
        ("org/name:a:b.gguf", R("org/name", file="a:b.gguf")),
        ("org/name:imatrix.dat", R("org/name", file="imatrix.dat")),
        ("org/name@v1.0", R("org/name", "v1.0")),
        ("org/name@v1.0:q4_0", R("org/name", "v1.0", quantisation="Q4_0")),
        ("org/name@refs/pr/1:file.gguf", R("org/name", "refs/pr/1", "file.gguf")),
        ("org/name@" + "a" * 40, R("org/name", "a" * 40)),
        ("o.r-g/n_a.m-e-GGUF", R("o.r-g/n_a.m-e-GGUF")),
        ("https://huggingface.co/org/name/blob/main/file.gguf", R("org/name", file="file.gguf")),
        ("huggingface.co/org/name/blob/main/file.gguf", R("org/name", file="file.gguf")),
        (
            "https://huggingface.co/org/name/resolve/v2/a/file.gguf?download=true",
            R("org/name", "v2", "a/file.gguf"),
        ),
        ("https://hf.co/org/name/raw/main/x%20y/%C3%A9.gguf", R("org/name", file="x y/é.gguf")),
        (
            "https://huggingface.co/org/name/blob/refs%2Fpr%2F7/file.gguf",
            R("org/name", "refs/pr/7", "file.gguf"),
        ),
        (
            "https://huggingface.co/org/name/blob/refs/pr/7/a/file.gguf",
            R("org/name", "refs/pr/7", "a/file.gguf"),
        ),
        ("https://huggingface.co/org/name/tree/dev", R("org/name", "dev")),
        (
            "https://huggingface.co/org/name?show_file_info=a%2Fm-Q4_K_M.gguf",
            R("org/name", file="a/m-Q4_K_M.gguf"),
        ),
        ("https://huggingface.co/org/name?local-app=llama.cpp", R("org/name")),
    ],
)
def test_of_a_hub(typed: str, meant: HubReference) -> None:
    assert parse(typed) == meant


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("https://example.org/file.gguf", "file.gguf"),
        ("https://example.org:8443/a/b/File.GGUF", "File.GGUF"),
        (f"https://example.org/a/file.gguf{SECRET}", "file.gguf"),
        ("https://huggingface.co.example.org/org/name/m.gguf", "m.gguf"),
        ("https://huggingface.co:8443/org/name/m.gguf", "m.gguf"),
        ("https://example.org/my%20model%20(2).gguf", "my-model-2-.gguf"),
        ("https://example.org/.hidden.gguf", "hidden.gguf"),
        ("https://example.org/100%25%20..x/y;a/..b/m.gguf", "m.gguf"),
        (f"https://example.org/{'n' * 300}.gguf", "n" * 195 + ".gguf"),
    ],
)
def test_of_an_address(typed: str, name: str) -> None:
    found = parse(typed)
    assert found == UrlReference(typed, name)
    assert str(found) == name
    assert "s3cret" not in repr(found)


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("https://example.org/a/m.gguf?b", ["a/m.gguf"]),
        ("https://example.org/%61%20b/m.gguf", ["%61%20b/m.gguf", "a b/m.gguf"]),
        ("https://example.org/a%3F/m.gguf", ["a%3F/m.gguf", "a?/m.gguf"]),
        ("https://example.org/a;v=1/b./m.gguf", ["a;v=1/b./m.gguf", "a/b/m.gguf"]),
        ("https://example.org/a%3Bv/m.gguf", ["a%3Bv/m.gguf", "a;v/m.gguf", "a/m.gguf"]),
    ],
)
def test_what_an_address_is_judged_by(typed: str, names: list[str]) -> None:
    found = parse(typed)
    assert found.names == tuple(f"https://example.org/{name}" for name in names)


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ("", "nothing is named: name a repository as org/name"),
        ("  ", "nothing is named"),
        (
            "qwen3:4b",
            r"'qwen3:4b' is neither a repository nor a suggestion.*org/name:Q4_K_M.*found by itself",
        ),
        ("llama3.2", "Ollama's"),
        ("registry.ollama.ai/library/qwen3:4b", "Ollama's"),
        ("https://ollama.com/library/qwen3", "Ollama's registry"),
        ("https://registry.ollama.ai/x.gguf", "Ollama's registry"),
        ("model.gguf", "file on this machine"),
        ("./models/m.gguf", "file on this machine"),
        ("../m.gguf", "file on this machine"),
        ("/srv/models/m.gguf", "file on this machine"),
        ("~/m.gguf", "file on this machine"),
        ("C:\\models\\m.gguf", "file on this machine"),
        ("org/name/a/file.gguf", "comes a colon: org/name:a/file.gguf"),
        ("org/name/file", "names no model"),
        ("org/na me", "names no model"),
        ("org/name:", "neither a file's name nor a quantisation"),
        ("org/name:Q4 K", "neither a file's name nor a quantisation"),
        ("org/name:folder/", "relative path"),
        ("org/name:../x.gguf", "relative path"),
        ("org/name:/x.gguf", "relative path"),
        ("org/name:a\\b.gguf", "relative path"),
        ("org/..:x.gguf", "names no model"),
        ("../name:x.gguf", "file on this machine"),
        ("org/name@", "after @ comes a branch"),
        ("org/name@a/../b", "after @ comes a branch"),
        ("org/name@a b:x.gguf", "after @ comes a branch"),
        ("org/na\x00me", "control characters"),
        ("org/na\u202eme", "control characters"),
        ("org/" + "n" * 9000, "too long"),
        ("http://huggingface.co/org/name", "only https"),
        ("http://example.org/m.gguf", "only https"),
        ("ftp://example.org/m.gguf", "only https"),
        ("file:///srv/m.gguf", "only https"),
        ("file:/srv/m.gguf", "file: is not pulled from"),
        ("s3:bucket/m.gguf", "s3: is not pulled from"),
        (f"https://me:s3cret@example.org/m.gguf{SECRET}", "credentials"),
        ("https://example.org/m.gguf#a", "fragment"),
        ("https://huggingface.co/org/name#model-card", "fragment"),
        ("https://example.org/a b.gguf", "space"),
        ("https://169.254.169.254/m.gguf", "names an address"),
        ("https://[::1]/m.gguf", "names an address"),
        ("https://localhost/m.gguf", "local names"),
        ("https:///m.gguf", "not a valid name"),
        (f"https://example.org/m.bin{SECRET}", r"suffix \.gguf"),
        ("https://example.org/.gguf", r"suffix \.gguf"),
        ("https://example.org/", r"suffix \.gguf"),
        ("https://example.org/%FF.gguf", "not UTF-8"),
        ("https://example.org/a.gguf/", r"suffix \.gguf"),
        *((f"https://example.org/public/{path}", r"empty part, \. or \.\.") for path in UPWARDS),
        *((f"https://example.org/public/{path}", "encoded slash, backslash") for path in HIDDEN),
        *((f"https://example.org/public/{path}", "encoded twice or wrongly") for path in TWICE),
        ("https://example.org//private/a.gguf", "empty part"),
        ("https://example.org/../a.gguf", "empty part"),
        ("https://example.org/m-00001-of-00002.gguf", "split into several"),
        ("https://huggingface.co/", "no model's"),
        ("https://huggingface.co/gpt2", "no model's"),
        ("https://huggingface.co/org/name/discussions/1", "no model's"),
        ("https://huggingface.co/org/name/blob", "no model's"),
        ("https://huggingface.co/org/name/blob/main", "ends before the file's name"),
        ("https://huggingface.co/org/name/tree/main/Q4_K_M", "address of a folder"),
        ("https://huggingface.co/datasets/org/name", "hub's datasets"),
        ("https://huggingface.co/hf.co/name", "'hf.co/name' is no repository"),
        ("https://huggingface.co/spaces/org/name", "hub's spaces"),
        ("https://huggingface.co/org/name/blob/main/..%2Fx.gguf", "relative path"),
    ],
)
def test_refused(typed: str, why: str) -> None:
    with pytest.raises(InvalidValue, match=why) as caught:
        parse(typed)
    assert caught.value.param == "model"
    assert "s3cret" not in caught.value.message
    assert len(caught.value.message) < 500


SAFE = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True)
FORMS = ("https://huggingface.co/", "hf:", "hf.co/", "HF.CO/", "org/name", "@", ":", "/", "://",
         "blob", "resolve", "main", "..", ".gguf", "-00001-of-00002", "?", "#", "%", "%2F", "é", "\ud800",
         "refs/pr/", "tree", "https:", "show_file_info=", "[", "]", "Q4_K_M", " ")  # fmt: skip


@given(st.one_of(st.text(), st.lists(st.sampled_from(FORMS) | st.text(max_size=3)).map("".join)))
def test_any_text_is_answered(typed: str) -> None:
    try:
        found = parse(typed)
    except InvalidValue as error:
        assert error.param == "model"
        return
    if isinstance(found, UrlReference):
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+@-]{0,199}", found.name)
        assert found.name.lower().endswith(".gguf")
    else:
        assert parse(found.repo) == HubReference(found.repo)
        assert found.file is None or found.quantisation is None
        assert not {"", ".", ".."} & set(f"{found.repo}/{found.revision}/{found.file}".split("/"))


@given(SAFE, SAFE, st.lists(SAFE, min_size=1, max_size=3), st.text(max_size=8))
def test_a_browsers_address_and_what_is_typed_mean_the_same(
    org: str, name: str, revision: list[str], file: str
) -> None:
    at, path = "/".join(revision), f"{file}.gguf"
    if not path.isprintable() or set(path) & set("/\\") or at[:8] == "refs/pr/":
        return
    meant = HubReference(f"{org}/{name}", at, path)
    for typed in (
        f"https://huggingface.co/{org}/{name}/blob/{quote(at, safe='')}/{quote(path)}",
        f"{org}/{name}@{at}:{path}",
        str(meant),
    ):
        assert parse(typed) == meant


# Which files


def files(*paths: str, size: int = 4_900_000_000) -> list[HubFile]:
    return [HubFile(path, size, "0" * 64) for path in paths]


def chosen(typed: str, *paths: str) -> list[str]:
    reference = parse(typed)
    assert isinstance(reference, HubReference)
    return [file.path for file in choose(files(*paths), reference)]


def fails(why: str, typed: str, *paths: str) -> str:
    with pytest.raises(InvalidValue, match=why) as caught:
        chosen(typed, *paths)
    assert caught.value.param == "model"
    return caught.value.message


EXTRAS = ("README.md", "config.json", "mmproj-F16.gguf", "m-mmproj-Q8_0.gguf", "imatrix.gguf", "lora.gguf",
          "m-imatrix.gguf", "m-imatrix.dat", "m-lora-f16.gguf", "adapter.gguf", "model.safetensors")  # fmt: skip


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_is_meant_only_by_its_name(extra: str) -> None:
    assert chosen("o/n", extra, "m.gguf") == ["m.gguf"]
    assert chosen(f"o/n:{extra}", extra, "m.gguf") == [extra]
    fails("has no model, unless one of its files is named|has no GGUF file", "o/n", extra)


def test_models_that_look_like_something_else() -> None:
    for name in ("m-imatrix-Q4_K_M.gguf", "m-lora-merged-Q4_K_M.gguf", "lorax.gguf", "M.GGUF"):
        assert chosen("o/n", name, "README.md") == [name]


class TestTags:
    def test_as_a_word_of_its_own(self) -> None:
        names = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m.Q8_0.gguf", "m_IQ4_XS.gguf", "m-BF16.gguf",
                 "m-F16.gguf", "q4_0-00001-of-00001.gguf", "m-Q4_0_4_4.gguf"]  # fmt: skip
        for tag, name in (
            ("q4_k_m", names[0]), ("Q4_K_S", names[1]), ("q8_0", names[2]), ("iq4_xs", names[3]),
            ("bf16", names[4]), ("f16", names[5]), ("Q4_0", names[6]), ("q4_0_4_4", names[7]),
        ):  # fmt: skip
            assert chosen(f"o/n:{tag}", *names) == [name]
        for tag in ("Q4", "Q4_K", "K_M", "0", "16"):
            message = fails(f"has no {tag} model; it has m-BF16", f"o/n:{tag}", *names, "README.md")
            assert "m-Q4_K_M.gguf (4.9 GB)" in message
            assert "README" not in message

    def test_in_a_folder(self) -> None:
        assert chosen("o/n:q8_0", "Q8_0/m.gguf", "Q4_0/m.gguf") == ["Q8_0/m.gguf"]

    def test_beside_another_recipe(self) -> None:
        both = "m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf"
        assert chosen("o/n:Q4_K_M", *both) == [both[0]]
        assert chosen("o/n:ud-q4_k_m", *both) == [both[1]]
        assert chosen("o/n:Q4_K_M", both[1], "m-Q8_0.gguf") == [both[1]]

    def test_two_of_them(self) -> None:
        message = fails("several models", "o/n:Q8_0", "a-Q8_0.gguf", "b-Q8_0.gguf", "c-Q4_0.gguf")
        assert "as in o/n:a-Q8_0.gguf" in message
        assert "c-Q4_0" not in message


class TestPreference:
    def test_in_order(self) -> None:
        names = [f"m-{tag}.gguf" for tag in PREFERRED]
        for first in range(len(names)):
            assert chosen("o/n", "m-Q2_K.gguf", *reversed(names[first:])) == [names[first]]
        assert PREFERRED[:5] == ("Q4_K_M", "Q5_K_M", "Q8_0", "Q4_0", "Q6_K")

    def test_the_only_one(self) -> None:
        assert chosen("o/n", "m-Q2_K.gguf", "README.md") == ["m-Q2_K.gguf"]

    def test_several(self) -> None:
        fails("several models.*a-Q4_K_M.*b-Q4_K_M", "o/n", "a-Q4_K_M.gguf", "b-Q4_K_M.gguf")
        fails("several models", "o/n", "m-Q2_K.gguf", "m-IQ1_S.gguf")

    def test_none(self) -> None:
        fails("has no GGUF file; .* ends in -GGUF", "o/n", "model.safetensors")
        fails("has no GGUF file", "o/n")

    def test_at_most_twenty_are_listed(self) -> None:
        names = [f"m{number:02}-Q4_K_M.gguf" for number in range(33)]
        message = fails(r"m19-Q4_K_M\.gguf \(4\.9 GB\), and 13 more", "o/n", *names)
        assert "m20" not in message


class TestNamed:
    def test_a_path(self) -> None:
        assert chosen("o/n:b/m.gguf", "a/m.gguf", "b/m.gguf") == ["b/m.gguf"]

    def test_not_there(self) -> None:
        there = "q4/Model-Q4_K_M.gguf", "q8/Model-Q8_0.gguf"
        for asked, meant in (
            ("model-q4_k_m.gguf", there[0]), ("Modell-Q8_0.gguf", "Model"), ("q8/Model-q8_0.gguf", there[1]),
        ):  # fmt: skip
            fails(
                rf"has no file '{asked}'; did you mean .*{meant}.*\?; it has q4",
                f"o/n:{asked}",
                *there,
            )
        message = fails("has no file 'zzz.gguf'; it has", "o/n:zzz.gguf", *there)
        assert "did you mean" not in message
        fails("no GGUF file at all", "o/n:zzz.gguf", "README.md")

    def test_among_very_many(self) -> None:
        names = [f"{'x' * 900}{number}.gguf" for number in range(5000)]
        assert len(fails("has no file", f"o/n:{'x' * 500}.gguf", *names)) < 50_000


class TestParts:
    three = tuple(f"q/m-Q8_0-{number:05}-of-00003.gguf" for number in (1, 2, 3))

    def test_all_in_order(self) -> None:
        for typed in ("o/n", "o/n:q8_0", *(f"o/n:{name}" for name in self.three)):
            assert chosen(typed, *reversed(self.three), "README.md") == list(self.three)

    @pytest.mark.parametrize("lost", [0, 1, 2])
    def test_missing(self, lost: int) -> None:
        there = [name for name in self.three if name != self.three[lost]]
        for typed in ("o/n", "o/n:Q8_0", f"o/n:{there[0]}"):
            message = fails(
                f"lacks 1 of the 3 files.*first of them {self.three[lost]}", typed, *there
            )
            assert message.endswith(self.three[lost])

    def test_odd_numbers(self) -> None:
        four, zero = "q/m-Q8_0-00004-of-00003.gguf", "q/m-Q8_0-00000-of-00003.gguf"
        for odd in (four, zero):
            assert chosen(f"o/n:{self.three[1]}", *self.three, odd) == list(self.three)
            assert chosen(f"o/n:{odd}", *self.three, odd) == [odd]

    def test_two_models_are_not_mixed(self) -> None:
        others = [name.replace("q/", "r/") for name in self.three]
        assert chosen(f"o/n:{others[0]}", *self.three, *others) == others
        assert f"{self.three[0]} and 2 more parts (14.7 GB)" in fails(
            "several", "o/n", *self.three, *others
        )


PARTS = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "q/", "Q4_K_M/", "mmproj-", "é"]),
    st.sampled_from(["m", "m-Q4_K_M", "m-UD-Q4_K_M", "m-Q8_0", "lora"]),
    st.sampled_from(
        ["", "-00001-of-00002", "-00002-of-00002", "-00003-of-00002", "-00000-of-00000"]
    ),
    st.sampled_from([".gguf", ".GGUF", ".bin"]),
)


@given(st.lists(PARTS, unique=True), st.none() | st.sampled_from(["Q4_K_M", "Q8_0"]), st.data())
def test_any_repository(paths: list[str], tag: str | None, data: st.DataObject) -> None:
    named = data.draw(st.none() | st.sampled_from(paths)) if paths and tag is None else None
    try:
        found = choose(files(*paths), HubReference("o/n", file=named, quantisation=tag))
    except InvalidValue as error:
        assert error.param == "model"
        return
    names = [file.path for file in found]
    assert names
    assert set(names) <= set(paths)
    assert named is None or named in names
    if "-of-00002" in names[0] and "-00003-" not in names[0] and names[0].lower().endswith("gguf"):
        assert [name.partition("-of-")[0][-5:] for name in names] == ["00001", "00002"]
        assert len({model_name(name) for name in names}) == 1
    else:
        assert len(names) == 1


def test_names_of_models() -> None:
    for path, name in (("a/m.gguf", "m"), ("m.Q4.GGUF", "m.Q4"), ("a/m-00001-of-00003.gguf", "m"),
                       ("m-1-of-3.gguf", "m-1-of-3")):  # fmt: skip
        assert model_name(path) == name

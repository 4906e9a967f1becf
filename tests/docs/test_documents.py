"""Documents name what there is: folders, policies, options, commands, reasons, public names."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields

import pytest

import lychee_compile
from lychee_compile import extend
from lychee_compile.codegen.module import has_prefill_kernels
from lychee_compile.kernels.gpu.methods import policies_with_kernels
from lychee_compile.kernels.policies.registry import policy_names, prefill_policy_names
from lychee_compile.option_devices import OPTION_DEVICES
from lychee_compile.options import Options
from tools import policies as policies_page
from tools import why_kept
from tools.links import ROOT

PAGES = sorted(ROOT.glob("docs/**/*.md"))
TOP = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def section(page, heading):
    """Return what stands below a heading of second level, up to the next heading."""
    return re.split(r"\n##+ ", text_of(page).partition(f"\n## {heading}\n")[2])[0]


def rows(text):
    """Return the cells of the rows of all tables, those of headings and rules among them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def described(text):
    """Return the rows whose first cell is a name in code, by that name."""
    return {cells[0].strip("`"): cells for cells in rows(text) if cells[0].startswith("`")}


def package_folders():
    found = (path.parent for path in ROOT.glob("lychee_compile/**/__init__.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def folders_of_map():
    """Return the folders that ARCHITECTURE.md draws as a tree, as paths."""
    tree = section("ARCHITECTURE.md", "Map").split("```")[1]
    above, found = {}, []
    for line in tree.strip().splitlines():
        match = re.match(r"( *)(\S+)/ ", line)
        if match:
            depth = len(match[1]) // 2
            above[depth] = match[2]
            found.append("/".join(above[level] for level in range(depth + 1)))
    return found


def test_the_map_has_every_package_folder():
    drawn = folders_of_map()
    assert len(drawn) == len(set(drawn))
    assert set(package_folders()) <= set(drawn)
    assert all((ROOT / path).is_dir() for path in drawn)


def test_options_are_described_with_their_defaults():
    table = described(text_of("docs/options.md").partition("\n## Errors")[0])
    assert set(table) == {each.name for each in fields(Options)}
    for each in fields(Options):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        assert table[each.name][1] == f"`{default!r}`", each.name


def test_options_have_an_effect_where_the_table_says_so():
    table = described(text_of("docs/options.md"))
    for name, devices in OPTION_DEVICES.items():
        marks = ["●" if device in devices else "○" for device in ("cpu", "cuda")]
        assert table[name][2:4] == marks, name


def test_options_without_effect_on_a_gpu_are_those_of_the_readme():
    silent = {name for name, devices in OPTION_DEVICES.items() if "cuda" not in devices}
    limits = section("README.md", "Limits")
    sentence = re.search(r"On a GPU the options (.*?) have no effect", limits, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence[1])) == silent


NAMES = {"Decoding": policy_names(), "Prefill": prefill_policy_names()}


@pytest.mark.parametrize("heading", list(NAMES))
def test_every_policy_has_a_row(heading):
    assert set(described(section("docs/policies.md", heading))) == set(NAMES[heading])


@pytest.mark.parametrize("heading", list(NAMES))
def test_the_kernel_column_of_policies_is_true(heading):
    table = described(section("docs/policies.md", heading))
    with_kernels = policies_with_kernels() if heading == "Decoding" else prefill_policy_names()
    assert {name for name, cells in table.items() if cells[2] == "yes"} == set(with_kernels)


def test_the_choosers_of_prefill_policies_are_true():
    table = described(section("docs/policies.md", "Prefill"))
    for name, cells in table.items():
        assert cells[3] == ("kernels" if has_prefill_kernels(name) else "PyTorch"), name


def test_the_page_of_reasons_is_up_to_date():
    assert why_kept.PAGE.read_text(encoding="utf-8") == why_kept.page(), "python -m tools.why_kept"


def test_the_table_of_decode_policies_is_up_to_date():
    assert policies_page.PAGE.read_text("utf-8") == policies_page.page(), "python -m tools.policies"


def test_commands_with_make_exist():
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    for page in [*TOP, *PAGES]:
        code = "\n".join(re.findall(r"```.*?```|`[^`]+`", page.read_text("utf-8"), re.DOTALL))
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", code, re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"


def test_every_target_of_make_is_told_to_contributors():
    shown = re.findall(r"^([a-z-]+):.*## ", text_of("Makefile"), re.MULTILINE)
    told = text_of("CONTRIBUTING.md")
    assert [name for name in shown if name != "help" and f"make {name}" not in told] == []


def test_modules_that_are_run_exist():
    for page in [*TOP, *PAGES]:
        for module in re.findall(
            r"python -m ((?:benchmarks|tools)[\w.]*)", page.read_text("utf-8")
        ):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_files_that_are_named_exist():
    begins = ("passes", "kernels", "codegen", "runtime", "cache", "report", "evaluate")
    below = dict.fromkeys(("detect", "graph", "symbolic", "lower", "absorb"), "passes")
    below |= {"templates": "codegen", "triton_lib": "codegen"}
    first = "|".join(("lychee_compile", "tests", "tools", "examples", *begins, *below))
    inside = re.compile(rf"`((?:{first})/[\w/.-]+)`")
    for page in [*TOP[:3], *PAGES]:
        for name in inside.findall(page.read_text("utf-8")):
            if "NAME" in name:
                continue
            top = name.split("/")[0]
            path = f"{below[top]}/{name}" if top in below else name
            path = f"lychee_compile/{path}" if top in begins or top in below else path
            assert (ROOT / path).exists(), f"{page.relative_to(ROOT)}: {name}"


def test_code_blocks_of_pages_are_python():
    for page in [*TOP, *PAGES]:
        for block in re.findall(
            r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
        ):
            source = block if not block.startswith('"') else f"_ = {{{block}}}"
            compile(source, str(page), "exec")


def test_names_imported_in_code_blocks_exist():
    for page in [*TOP, *PAGES]:
        for block in re.findall(
            r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
        ):
            for line in re.findall(r"^from lychee_compile.*", block, re.MULTILINE):
                exec(line, {})
            for name in re.findall(r"lychee_compile\.(\w+)\(", block):
                assert hasattr(lychee_compile, name), f"{page.name}: {name}"


def test_public_names_are_on_the_page_of_the_api():
    page = text_of("docs/api.md")
    names = [*lychee_compile.__all__, *extend.__all__]
    assert [name for name in names if not re.search(rf"\b{name}\b", page)] == []


def test_the_readme_is_short_and_its_tables_are_full():
    page = text_of("README.md")
    assert len(page.splitlines()) <= 170
    assert "pip install" in page
    assert all(all(cells) for cells in rows(page)), "no empty cell"


def test_ratios_of_the_readme_are_against_the_fastest_dense_attention():
    head, _, *table = rows(section("README.md", "Speed"))
    dense, sparse, ratio = (
        head.index(name) for name in ("SDPA, `enable_gqa`", "lychee, sparse", "times faster")
    )
    for cells in table:
        times = [float(cell.strip("*").replace(",", "")) for cell in cells]
        assert times[dense] == min(times[1 : dense + 1])
        exact = times[dense] / times[sparse]
        assert times[ratio] == pytest.approx(exact, abs=0.05 if exact < 10 else 0.5)


def test_the_glossary_is_in_order():
    words = [cells[0].strip("*").lower() for cells in rows(text_of("docs/glossary.md"))[2:]]
    assert words == sorted(words)

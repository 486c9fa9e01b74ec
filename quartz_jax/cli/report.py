"""Make one self-contained HTML page of what evaluate measured.

quartz report --results outputs/evaluation.json --out outputs/report.html
"""

from collections.abc import Sequence
from pathlib import Path

from quartz_jax.cli import arguments as cli
from quartz_jax.evaluation.pages import html as pages
from quartz_jax.evaluation.pages.comparison import comparison_page
from quartz_jax.evaluation.results import read_results
from quartz_jax.io.files import check_apart, check_output


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = cli.ArgumentParser(prog="quartz report", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--results", type=Path, default=Path("outputs/evaluation.json"), help="of evaluate")
    add("--note", default="", help="a paragraph to put first")
    add("--analyses", default="", help="file name of the page that analyze wrote, to link to")
    add("--out", type=Path, default=Path("outputs/report.html"), help="the page")
    args = parser.parse_args(argv)
    check_output(args.out)
    check_apart(args.out, [args.results])
    results = read_results(args.results)
    link = pages.text(args.analyses)
    links = f"<p><a href='{link}'>The paper's analyses on this model</a></p>" if link else ""
    page = comparison_page(results, args.results.with_suffix(".images"), args.note, links)
    pages.write_page(args.out, page)
    print(args.out)

"""Our server's own pages as HTML: the list of runs, and what Visdom's page lacks. Pure."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from gravitar_dqn.dashboard.panes import duration, state_badge
from gravitar_dqn.run.status import Standing

VISDOM_TITLE = "<title>visdom</title>"

# The page stays the same when other environments are ticked: what it asks the server for tells which. Tab and address
# follow, so that a comparison can be reloaded and sent to somebody.
FOLLOW = """
(function () {
  const open = XMLHttpRequest.prototype.open;
  XMLHttpRequest.prototype.open = function (method, url) {
    const asked = /(?:^|\\/)(env|compare)\\/([^/?#]+)$/.exec(url);
    if (asked !== null) {
      const names = decodeURIComponent(asked[2]).split('+').join(' + ');
      document.title = asked[1] === 'env' ? names : 'compare ' + names;
      history.replaceState(null, '', url);
    }
    return open.apply(this, arguments);
  };
})();
"""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 24px auto; max-width: 1240px; padding: 0 16px; color: #222 }
table { border-collapse: collapse; width: 100% }
th { text-align: left; color: #555; font-weight: normal; border-bottom: 1px solid #bbb }
td { border-bottom: 1px solid #e5e5e5 }
td, th { padding: 4px 12px 4px 0 }
.number { text-align: right; font-variant-numeric: tabular-nums }
a { color: #0072B2 }
"""

COMPARE = """
document.getElementById('compare').onclick = function () {
  const ticked = [...document.querySelectorAll('input:checked')].map(box => box.value).reverse();  // oldest first
  if (!ticked.length) alert('tick the runs first');
  else location = (ticked.length > 1 ? 'compare/' : 'env/') + ticked.join('+');
};
"""


def entitled(page: str, title: str) -> str:
    """Visdom's page with a title, in the browser's tab, that follows what is shown."""
    return page.replace(VISDOM_TITLE, f"<title>{html.escape(title)}</title><script>{FOLLOW}</script>")


def runs_page(runs: Sequence[tuple[str, Standing]], others: Iterable[str]) -> str:
    """The list of the runs, by environment, in their order; and the names of the server's other environments."""
    titles = ["", "run", "preset", "seed", "state", "steps", "trained", "mean of last 100", "best evaluation"]
    head = "".join(f"<th{_number(i)}>{title}</th>" for i, title in enumerate(titles))
    body = "".join(_row(environment, run) for environment, run in runs)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    more = "".join(f"<li><a href='{_page(name)}'>{html.escape(name)}</a></li>" for name in others)
    compare = (
        "<p><button id='compare'>Compare the ticked</button> "
        "or tick several in the field Environment of a run's page.</p>"
        f"<script>{COMPARE}</script>"
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>runs</title>"
        f"<link rel='icon' href='data:,'><style>{STYLE}</style></head><body><h1>Runs</h1>"
        + (table + compare if runs else "<p>No run has been drawn here yet.</p>")
        + (f"<h2>Other pages</h2><ul>{more}</ul>" if more else "")
        + "</body></html>"
    )


def _row(environment: str, run: Standing) -> str:
    scores = "-" if run.mean_score is None else f"{run.mean_score:,.1f}", str(run.best or "-")
    cells = [
        f"<input type='checkbox' value='{html.escape(environment)}'>",
        f"<a href='{_page(environment)}'>{html.escape(run.run_dir.name)}</a>",
        html.escape(run.config.preset),
        str(run.config.seed),
        state_badge(run.state),
        f"{run.global_step:,}",
        duration(run.minutes),
        *scores,
    ]
    return "<tr>" + "".join(f"<td{_number(i)}>{cell}</td>" for i, cell in enumerate(cells)) + "</tr>"


def _number(column: int) -> str:
    return " class='number'" if column in (3, 5, 6, 7, 8) else ""


def _page(environment: str) -> str:
    return f"env/{quote(environment, safe='')}"

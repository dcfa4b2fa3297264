"""The comparison's page in a browser, by day and by night, on a phone and on a desk."""

from pathlib import Path

import browser
import pytest
from compared import many_runs

from cnnpipe.evaluation import comparison_page
from cnnpipe.evaluation.comparison import compare

ODD = ["<script>alert(1)</script>", "$x$", "NA", "a\nb", "😀", "x" * 200]


@pytest.mark.browser
@pytest.mark.skipif(not browser.CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("num_runs", [1, 3, 40])
def test_the_page_is_whole_and_asks_for_nothing(tmp_path: Path, num_runs: int) -> None:
    runs = many_runs(num_runs, [*ODD, *(f"class {i}" for i in range(94))], 400)
    for name, run in zip(ODD, runs, strict=False):
        object.__setattr__(run, "name", name)
    file = tmp_path / "compare.html"
    file.write_text(comparison_page.page(compare(runs), tmp_path))
    with browser.browser() as page:
        for width in browser.WIDTHS:
            for dark in (False, True):
                page.open(file.as_uri(), width, dark)
                page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
                assert page.overflow_px() <= 0
                assert page.missing_pictures() == []
        assert page.evaluate("document.images.length") == 5
        assert page.complaints == []
        assert {url for url in page.requests if not url.startswith("data:")} == {file.as_uri()}

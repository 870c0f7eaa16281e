"""Checks the documentation site that `make site` has built: `make site-check`.

Every link inside the site leads to a page and to an anchor that there are, and names of the API are the public ones. Then
Chromium opens every page: nothing may be said on the console or fetched from elsewhere, no page may scroll sideways on a phone,
and axe finds no fault (in the dark theme it looks at some pages). Search finds `mu.scan` by the name of an argument. A page that
`mu.inspect.page` wrote is opened too. Pictures of some pages, or of all, are left in `build/site_pictures`.

With `--outside` it asks for each address outside of the site instead, and says which do not answer.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import html.parser
import http.server
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from navigation import ADDRESS, REPOSITORY
from playwright.sync_api import Browser, BrowserType, Page, ViewportSize, sync_playwright

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "site"
PICTURES = ROOT / "build" / "site_pictures"
SAMPLE = ROOT / "build" / "sample"  # a page by `mu.inspect.page`, of `docs/site/sample.py`
AXE_VERSION = "4.14.1"
AXE = Path(sys.prefix) / "node_modules" / "axe-core" / "axe.min.js"
PHONE: ViewportSize = {"width": 390, "height": 844}
DESK: ViewportSize = {"width": 1280, "height": 900}

# Pages of which a picture is taken.
SHOWN = (
    "",
    "learn/first_model/",
    "learn/mental_model/",
    "errors/",
    "api/transforms/",
    "api/cells/",
    "semantics/",
    "coming_from/nnx/",
    "performance/",
    "examples/kalman/",
)


class Links(html.parser.HTMLParser):
    """The links and the anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.anchors.add(str(found["id"]))
        if tag == "a" and found.get("name"):
            self.anchors.add(str(found["name"]))
        for key in ("href", "src"):
            if found.get(key) and tag in {"a", "img", "script", "link", "source"}:
                self.links.append(str(found[key]))


def pages() -> list[str]:
    """The addresses of all pages, below that of the site."""
    found = (path.relative_to(SITE).as_posix() for path in sorted(SITE.rglob("*.html")))
    return [name.removesuffix("index.html") for name in found if name != "404.html"]


def links_of_all() -> dict[str, Links]:
    """The links of each page."""
    return {page: Links(file_of(page).read_text(encoding="utf-8")) for page in pages()}


def outside_links() -> list[str]:
    """Each address outside of the site that does not answer, with a page that has it; those of the repository are left out."""
    found: dict[str, str] = {}
    for page, links in links_of_all().items():
        for link in links.links:
            if link.startswith(("https:", "http:")) and not link.startswith((REPOSITORY, ADDRESS)):
                found.setdefault(urllib.parse.urldefrag(link).url, page)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = pool.map(answer_of, found)
        return [
            f"{page or '/'}: {link}: {said}" for (link, page), said in zip(found.items(), answers, strict=True) if said
        ]


def answer_of(link: str) -> str | None:
    """Why an address does not answer; None if it does."""
    request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    try:
        with urllib.request.urlopen(request, timeout=30):
            return None
    except urllib.error.HTTPError as error:
        return None if error.code in {403, 429} else str(error)  # it is there, and for people only
    except OSError as error:
        return str(error)


def broken_links() -> list[str]:
    """Each link inside the site that leads nowhere."""
    read = links_of_all()
    problems = []
    for page, found in read.items():
        for link in found.links:
            parts = urllib.parse.urlsplit(urllib.parse.urljoin(f"http://site/{page}", link))
            if parts.netloc != "site" or parts.scheme not in {"http", "https"}:
                continue
            target = urllib.parse.unquote(parts.path).removeprefix("/")
            file = file_of(target)
            if not file.is_file():
                problems.append(f"{page or '/'}: {link} leads to no page")
            elif target in read and urllib.parse.unquote(parts.fragment) not in read[target].anchors:
                problems.append(f"{page or '/'}: {link} leads to no anchor")
    return sorted(set(problems))


def internal_names() -> list[str]:
    """Each page that names something by the file it is defined in, rather than by its public name."""
    folders = "core|model|tracing|transforms|compilation|exporting|accumulation|collecting|interventions|checks"
    problems = []
    for page in pages():
        if page.startswith("api/"):
            found = re.findall(rf"mutatis\.(?:{folders})\.\w+", file_of(page).read_text(encoding="utf-8"))
            problems += [f"{page}: shows {name}" for name in sorted(set(found))]
    return problems


def file_of(page: str) -> Path:
    return SITE / page / "index.html" if not page or page.endswith("/") else SITE / page


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, and writes no log."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """A folder at an address of this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()


def opened(chromium: BrowserType) -> Browser:
    """The Chromium of the system; without one that of Playwright, which is fetched if it is not there."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return chromium.launch(executable_path=path, args=["--no-sandbox"])
    subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)
    return chromium.launch()


def axe() -> str:
    """The source of axe-core, which is fetched once."""
    if not AXE.exists():
        package = f"axe-core@{AXE_VERSION}"
        command = ["npm", "install", "--silent", "--no-save", "--prefix", sys.prefix, package]
        subprocess.run(command, check=True)
    return AXE.read_text(encoding="utf-8")


AXE_RUN = """async () => (await axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']}))
    .violations.map(v => [v.id, v.impact, v.nodes.length, v.nodes[0].target.join(' '), v.nodes[0].failureSummary])"""

TOO_WIDE = """() => {
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= width) return null;
    const wide = [...document.querySelectorAll('.md-content *')].filter(e => e.getBoundingClientRect().right > width + 1);
    return wide.slice(0, 3).map(e => e.tagName + '.' + e.className + ': ' + e.textContent.slice(0, 60)).join(' | ');
}"""


def look(page: Page, address: str, name: str, scheme: str, source: str) -> list[str]:
    """What is wrong with one page in one theme."""
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in {"error", "warning"} else None)
    page.on("request", lambda request: None if request.url.startswith((address, "data:")) else said.append(request.url))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("response", lambda answer: said.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    page.goto(address + name, wait_until="load")
    problems = [f"{name or '/'} ({scheme}): says on the console: {text}" for text in said]
    if scheme == "dark" and name not in SHOWN:
        return problems
    page.evaluate(source)
    for rule, impact, count, target, summary in page.evaluate(AXE_RUN):
        message = " ".join(summary.split())
        problems.append(f"{name or '/'} ({scheme}): {rule} ({impact}, {count} times), first {target}: {message}")
    if scheme == "light":
        page.set_viewport_size(PHONE)
        wide = page.evaluate(TOO_WIDE)
        if wide is not None:
            problems.append(f"{name or '/'}: scrolls sideways on a phone: {wide}")
        page.set_viewport_size(DESK)
        code = page.locator(".highlight pre > code").count()
        buttons = page.locator(".highlight [data-md-type=copy], .highlight .md-clipboard").count()
        if code and not buttons:
            problems.append(f"{name or '/'}: code without a button to copy it")
    return problems


def search(page: Page, address: str) -> list[str]:
    """Search for the name of an argument."""
    page.goto(address, wait_until="load")
    page.keyboard.press("/")
    page.keyboard.type("checkpoint_every", delay=20)
    deadline = time.monotonic() + 15
    links: list[str] = []
    while time.monotonic() < deadline:
        links = page.evaluate(
            "() => { const all = r => [...r.querySelectorAll('*')].flatMap(e => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);"
            "return all(document).filter(e => e.tagName == 'A' && /[?&]h=/.test(e.href)).map(e => e.href + ' ' + e.innerText) }"
        )
        if any("mutatis.scan" in link for link in links[:5]):
            page.screenshot(path=PICTURES / "search.png")
            return []
        page.wait_for_timeout(200)
    page.screenshot(path=PICTURES / "search.png")
    return [f"search for checkpoint_every does not find mutatis.scan first, but {links[:5]}"]


def look_at_sample(browser: Browser) -> list[str]:
    """What is wrong with a page by `mu.inspect.page`: as the pages of the site, and its tree folds."""
    problems: list[str] = []
    with served(SAMPLE) as address:
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport=DESK, color_scheme=scheme)
            found = look(page, address, "", scheme, axe())
            shown = "() => [...document.querySelectorAll('details')].map(fold => fold.open)"
            before = page.evaluate(shown)
            page.locator("summary").first.click()
            if not before or page.evaluate(shown)[0] == before[0]:
                found.append(f"/ ({scheme}): its tree does not fold")
            page.locator("summary").first.click()
            page.screenshot(path=PICTURES / f"sample_{scheme}.png", full_page=True)
            page.close()
            problems += [problem.replace("/", "mu.inspect.page", 1) for problem in found]
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    return problems


def take_pictures(browser: Browser, address: str, names: Sequence[str]) -> None:
    for scheme in ("light", "dark"):
        for size, viewport in (("desk", DESK), ("phone", PHONE)):
            context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
            page = context.new_page()
            for name in names:
                if file_of(name).is_file():
                    page.goto(address + name, wait_until="load")
                    file = f"{name.strip('/').replace('/', '_') or 'index'}_{scheme}_{size}.png"
                    page.screenshot(path=PICTURES / file)
            context.close()


def look_at_all(browser: Browser, address: str, names: list[str]) -> list[str]:
    source = axe()
    problems: list[str] = []
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport=DESK, color_scheme=scheme, reduced_motion="reduce")
        for name in names:
            page = context.new_page()
            found = look(page, address, name, scheme, source)
            sys.stdout.write("".join(f"{problem}\n" for problem in found))
            problems += found
            page.close()
        context.close()
    page = browser.new_page(viewport=DESK)
    found = search(page, address)
    sys.stdout.write("".join(f"{problem}\n" for problem in found))
    return problems + found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", action="store_true", help="check the links only, without a browser")
    parser.add_argument("--outside", action="store_true", help="ask for the addresses outside of the site only")
    parser.add_argument("--only", default="", help="open the pages whose address starts so")
    parser.add_argument("--pictures", action="store_true", help="take pictures of all these pages, and do nothing else")
    options = parser.parse_args()
    if not (SITE / "index.html").exists():
        sys.exit("There is no site in build/site: `make site` builds it.")
    PICTURES.mkdir(parents=True, exist_ok=True)
    if options.outside:
        problems = outside_links()
        sys.exit("\n".join([*problems, f"{len(problems)} do not answer"]) if problems else 0)
    problems = broken_links() + internal_names()
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    names = [name for name in pages() if name.startswith(options.only)]
    if not options.links:
        with served(SITE) as address, sync_playwright() as playwright:
            browser = opened(playwright.chromium)
            take_pictures(browser, address, names if options.pictures else SHOWN)
            if not options.pictures:
                problems += look_at_all(browser, address, names)
                problems += look_at_sample(browser)
            browser.close()
    if problems:
        sys.exit(f"{len(problems)} problems")
    sys.stdout.write(f"{len(names)} pages are well\n")


if __name__ == "__main__":
    main()

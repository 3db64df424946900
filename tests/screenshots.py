"""Pictures of the page, to look at: python tests/screenshots.py [--checkpoint FOLDER] [--out FOLDER]"""

import tempfile
from pathlib import Path

import tyro
from conftest import open_browser, served
from playwright.sync_api import expect, sync_playwright

SCREENS = {"desktop": (1280, 800), "phone": (375, 812)}
TABS = (("Sampling", "#source", "#stages"), ("Attention", "#attention-source", "#head-map"))
MESSAGES = ("Hi! How are you today?", "I lost my keys and I am late for work.", "What should I cook for dinner?")


def photograph(checkpoint: Path = Path("checkpoints/tinygpt-chat"),
               out: Path = Path(tempfile.gettempdir()) / "tinygpt-screenshots") -> None:
    """Save the page at its start, in a conversation, after a message that is too long, and the other tabs on its reply.

    Args:
        checkpoint: Checkpoint folder, as train.py writes it.
        out: Folder for the pictures.
    """
    out.mkdir(parents=True, exist_ok=True)
    with served(checkpoint) as url, sync_playwright() as driver:
        browser = open_browser(driver)
        for screen, (width, height) in SCREENS.items():
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                page.goto(url)
                box = page.locator("#message textarea")
                expect(box).to_be_visible(timeout=15_000)
                page.screenshot(path=out / f"{screen}-{scheme}-start.png")
                for number, message in enumerate(MESSAGES, 1):
                    box.fill(message)
                    box.press("Enter")
                    expect(page.locator("#conversation [data-testid=bot]")).to_have_count(number)
                    expect(page.locator("#message [data-testid=submit-button]")).to_be_visible(timeout=15_000)
                page.wait_for_timeout(500)
                page.screenshot(path=out / f"{screen}-{scheme}-chat.png")
                box.fill("a long story " * 200)
                box.press("Enter")
                expect(page.get_by_test_id("toast-body")).to_be_visible()
                page.wait_for_timeout(500)
                page.screenshot(path=out / f"{screen}-{scheme}-too-long.png")
                for tab, source, shown in TABS:
                    page.get_by_role("tab", name=tab).click()
                    page.locator(source).get_by_label("the chat's reply").click()
                    expect(page.locator(f"{shown} .js-plotly-plot")).to_be_visible(timeout=30_000)
                    page.wait_for_timeout(4_000)
                    page.screenshot(path=out / f"{screen}-{scheme}-{tab.lower()}.png", full_page=True)
                page.close()
        browser.close()
    print(f"{len(list(out.glob('*.png')))} pictures are in {out}")


if __name__ == "__main__":
    tyro.cli(photograph)

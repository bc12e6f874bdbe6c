"""A browser for the tests of pages."""

import os
import shutil

import pytest


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: the one that PIT_JAX_CHROMIUM names, one that is installed, or Playwright's own."""
    from playwright import sync_api

    found = os.environ.get("PIT_JAX_CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "google-chrome"))), None
    )
    with sync_api.sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, as whom containers run.
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield chromium
        chromium.close()

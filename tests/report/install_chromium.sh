#!/bin/sh
# Installs the browser that tests/report/test_report_browser.py opens the report in
# (Debian and Ubuntu; needs root). Without one those tests are skipped.
set -eu
apt-get update
apt-get install --yes --no-install-recommends chromium ||
    apt-get install --yes --no-install-recommends chromium-browser

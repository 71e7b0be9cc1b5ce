"""Writes conversations by a chat template, in a process that ends itself: see `etr.data.chat`.

Run as a script. One JSON object a line comes in, one goes out for each.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

MEMORY = 1 << 30
"""Bytes that a template may take, where the system limits them."""


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing but answers goes out
    sys.modules["torch"] = None  # type: ignore[assignment]  # not needed, and slow to import
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    _say(answers, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        # A thread below Python, which no template can stop or hold up.
        faulthandler.dump_traceback_later(request["seconds"], exit=True)
        try:
            rendered: list[Any] = [
                render_jinja_template([chat["messages"]], **chat["options"], **request["common"])
                for chat in request["chats"]
            ]
            written = [str(texts[0]) for texts, *_ in rendered]
            if max(map(len, written)) > request["characters"]:
                raise ValueError(f"it writes more than {request['characters']} characters")
            found: dict[str, Any] = {"texts": written}
        except Exception as error:  # a template raises what it likes
            line = getattr(error, "lineno", None)  # of a syntax error
            place = f" in line {line}" if line else ""
            found = {"error": f"{type(error).__name__}{place}: {str(error)[:2000]}"}
        faulthandler.cancel_dump_traceback_later()
        _say(answers, found)


def _limit_memory() -> None:
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    except (ImportError, OSError, ValueError):
        pass  # elsewhere the time limit alone ends it


def _say(answers: TextIO, values: dict[str, Any]) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()

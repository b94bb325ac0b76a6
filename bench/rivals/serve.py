"""The loop of every rival: a request of JSON a line on stdin, an answer a line on stdout, until stdin ends.

What a rival's libraries print goes to stderr: stdout is taken from them before they are asked anything.
"""

import json
import os
import sys


def serve(handle):
    """Answers each request with `handle(request)`, a dict; an exception becomes `{"error": …}`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = handle(json.loads(line))
        except Exception as error:  # whatever it is, the other side should read it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

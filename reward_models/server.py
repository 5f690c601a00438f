"""A reward on a server, with nothing but the standard library: run it, then name its URL in a recipe.

python reward_models/server.py --port 5000
reward: http://127.0.0.1:5000/score
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def score(prompt, completion):
    """Yours: a number, or None for no score. This one likes short answers."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return -float(len(text.split())) if text else None


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        pairs = zip(asked["prompts"], asked["completions"], strict=True)
        answer = json.dumps({"rewards": [score(prompt, completion) for prompt, completion in pairs]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=5000)
    server = ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler)
    print(f"scoring on http://127.0.0.1:{server.server_port}/score", flush=True)
    server.serve_forever()

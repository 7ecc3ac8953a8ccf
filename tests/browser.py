"""A headless Chromium that a test steers: Chromium's own protocol over two pipes, without another package."""
import json, os, shutil, subprocess, time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "about:blank"]


class Browser:
    "One page of a browser, `width` wide, dark if asked; a context manager"
    def __init__(self, folder, width, dark=False): self.folder, self.width, self.dark = folder, width, dark

    def __enter__(self):
        (read, theirs_out), (theirs_in, self.write) = os.pipe(), os.pipe()
        hand_over = lambda: (os.dup2(theirs_in, 3), os.dup2(theirs_out, 4))
        self.process = subprocess.Popen([CHROMIUM, f"--user-data-dir={self.folder/'profile'}", *FLAGS], close_fds=False,
                                        preexec_fn=hand_over, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (theirs_in, theirs_out): os.close(end)
        self.read, self.number, self.session, self.events = os.fdopen(read, "rb"), 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Runtime", "Page", "DOM", "Log"): self.call(f"{part}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=self.width, height=900, deviceScaleFactor=1,
                  mobile=self.width < 600)
        scheme = dict(name="prefers-color-scheme", value="dark" if self.dark else "light")
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.read.close()
        os.close(self.write)

    def call(self, method, **parameters):
        "Ask the browser for something; events that come in between are kept"
        self.number += 1
        asked = dict(id=self.number, method=method, params=parameters)
        if self.session: asked["sessionId"] = self.session
        os.write(self.write, json.dumps(asked).encode() + b"\0")
        while True:
            told = b""
            while not told.endswith(b"\0"):
                byte = self.read.read(1)
                assert byte, "the browser has ended"
                told += byte
            told = json.loads(told[:-1])
            if told.get("id") != self.number: self.events.append(told)
            elif "error" in told: raise RuntimeError(told["error"]["message"])
            else: return told["result"]

    def open(self, address):
        self.call("Page.navigate", url=address)
        self.wait("document.readyState == 'complete' && location.href != 'about:blank'")

    def run(self, script):
        "The value of an expression in the page"
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told: raise RuntimeError(told["exceptionDetails"]["exception"]["description"])
        return told["result"].get("value")

    def wait(self, script, seconds=60):
        "Until an expression is true"
        end = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > end: raise TimeoutError(f"{script}: {self.run('document.body.innerText')[:500]}")
            time.sleep(.05)

    def drop(self, id, path):
        "Give a file to an input"
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=f"#{id}")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def errors(self):
        "What went wrong in the page's own script"
        return [event for event in self.events if event.get("method") == "Runtime.exceptionThrown"]

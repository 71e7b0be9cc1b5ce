// A worker in a frame: browsers start no worker for pages that are opened from a folder, and the
// site's search is one.
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.append(this.frame);
    this.inner = this.frame.contentWindow;
    this.inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}));
    const script = this.inner.document.createElement("script");
    script.src = url;
    this.ready = new Promise(done => { script.onload = done; });
    this.inner.document.body.append(script);
  }

  postMessage(data) {
    this.ready.then(() => this.inner.dispatchEvent(new this.inner.MessageEvent("message", {data})));
  }

  terminate() {
    this.frame.remove();
  }
};

// The other tabs of this browser with this page: they show what a person does with tasks here, and how these go on.

const NAME = "imagegen.tabs";

export class Tabs {
  #channel = null;

  // Begins to receive. receiver: `receive(record)`, `drop(record)` and `followAll()`, called for the other tabs.
  open(receiver) {
    if (typeof BroadcastChannel !== "function") return;
    this.#channel = new BroadcastChannel(NAME);
    this.#channel.onmessage = ({ data: { kind, record } }) => {
      if (kind === "put") receiver.receive(record);
      else if (kind === "remove") receiver.drop(record);
      else if (kind === "closed") receiver.followAll();
    };
  }

  put(record) {
    this.#channel?.postMessage({ kind: "put", record });
  }

  remove({ owner, id }) {
    this.#channel?.postMessage({ kind: "remove", record: { owner, id } });
  }

  // The tasks of this tab are followed by the other tabs from now on.
  close() {
    this.#channel?.postMessage({ kind: "closed" });
  }
}

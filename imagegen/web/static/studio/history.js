// Records of this browser's tasks, kept in IndexedDB; in memory alone where the browser offers none.

const NAME = "imagegen";
const TASKS = "tasks";
const RETRY_MS = 400;
const RETRIES = 3;

export class History {
  #opening = null;

  // Returns the records of one owner. owner: see `ownerOf` of tasks.js.
  async open(owner) {
    try {
      const records = await this.#read(RETRIES);
      return records.filter((record) => record.owner === owner);
    } catch {
      this.#opening = null;
      return [];
    }
  }

  // Reads all records. A browser may open a database without any event after a reload, and another request at the same time
  // with success in a millisecond (Chromium 156), so a silent request is repeated.
  #read(retries) {
    this.#opening ||= opened(indexedDB.open(NAME, 1));
    let isSilent = true;
    const reading = this.#opening.then((database) => done(storeOf(database, "readonly").getAll())).finally(() => { isSilent = false; });
    const retrying = new Promise((resolve) => { setTimeout(resolve, RETRY_MS); }).then(() => {
      if (!isSilent || !retries) return reading;
      this.#opening = null;
      return this.#read(retries - 1);
    });
    return Promise.race([reading, retrying]);
  }

  async put(record) {
    await this.#change((store) => store.put(record));
  }

  async remove({ owner, id }) {
    await this.#change((store) => store.delete([owner, id]));
  }

  async #change(action) {
    try {
      await done(action(storeOf(await this.#opening, "readwrite")));
    } catch {
      // The disk is full or the database is gone: the page goes on without it.
    }
  }
}

function storeOf(database, mode) {
  return database.transaction(TASKS, mode).objectStore(TASKS);
}

function opened(request) {
  request.onupgradeneeded = () => request.result.createObjectStore(TASKS, { keyPath: ["owner", "id"] });
  return done(request);
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}

// Records of this browser's tasks, kept in IndexedDB; in memory alone where the browser offers none.

const NAME = "imagegen";
const TASKS = "tasks";

export class History {
  #opening = null;

  // Returns the records of one owner. owner: see `ownerOf` of tasks.js.
  async open(owner) {
    try {
      this.#opening ||= opened(indexedDB.open(NAME, 1));
      const records = await done(storeOf(await this.#opening, "readonly").getAll());
      return records.filter((record) => record.owner === owner);
    } catch {
      this.#opening = null;
      return [];
    }
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

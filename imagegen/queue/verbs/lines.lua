-- Functions for the lines of clients; put before the scripts that use them. A client with many tasks has some of them
-- in the stream; the others wait in its line, a list, and are moved into the stream one by one as its tasks end.
--
-- An element of a line: schema version, epoch, digest, task id; record JSON; entry JSON; each part on its own line. The
-- record of a waiting task names no entry, but IN_LINE. An element counts while its record does so, in the same epoch.
--
-- Which task is next is only in the line, so the keys of moved records are made here; all have one hash tag.

local IN_LINE = 'line'

local function key_of(stream, kind, name) return string.gsub(stream, ':tasks$', ':' .. kind .. ':') .. name end

-- Returns whether the line of a task that waits in one exists.
local function has_line(stream, record)
  local client = string.match(record, '^[^\n]*\n.*"client":"([^"]*)"')
  return client ~= nil and redis.call('EXISTS', key_of(stream, 'line', client)) == 1
end

-- Returns the client of an entry, nil without one. Text that looks the same in its request has other braces behind it.
local function client_of(entry_json)
  local client, rest = string.match(entry_json, '.*"client":"([^"]*)"(.*)$')
  local is_last = rest and (string.find(rest, '^[^{}]*}$') or string.find(rest, '^[^{}]*{[^{}]*}}$'))
  return is_last and client or nil
end

local function element_of(version, epoch, digest, id, record_json, entry_json)
  return version .. ' ' .. epoch .. ' ' .. digest .. ' ' .. id .. '\n' .. record_json .. '\n' .. entry_json
end

-- Runs a command on a key. A key of another type is moved aside for a week, since the script has written other keys.
local function run_on(command, key, ...)
  local reply = redis.pcall(command, key, ...)
  if type(reply) ~= 'table' or not reply.err then return reply end
  redis.call('RENAME', key, key .. ':aside')
  redis.call('EXPIRE', key .. ':aside', 604800)
  return redis.call(command, key, ...)
end

-- Adds elements to the end of a line. Returns its length.
local function push(index, line, client, elements)
  local length = run_on('RPUSH', line, unpack(elements))
  if length == #elements then run_on('SADD', index, client) end
  return length
end

-- Adds the entry of an element to the stream, and names it in the record. Returns the id of the task, its entry or nil,
-- and the number of commands.
local function enqueue(stream, element, life)
  local version, epoch, digest, id, record_json, entry_json =
    string.match(element, '^(%d+) (%d+) (%x+) (%x+)\n([^\n]*)\n(.*)$')
  if not version then return '', nil, 0 end
  local key, head = key_of(stream, 'task', id), ' ' .. epoch .. ' ' .. epoch .. ' ' .. digest .. '\n'
  local entry = redis.call('XADD', stream, '*', 'v', version, 'g', epoch, 'd', entry_json)
  local record = version .. ' pending ' .. entry .. head .. record_json
  local before = redis.pcall('SET', key, record, 'XX', 'GET', 'KEEPTTL')
  if before == version .. ' pending ' .. IN_LINE .. head .. record_json then return id, entry, 2 end
  if type(before) == 'string' then
    local start, named, their_epoch, rest = string.match(before, '^(%d+ pending )(%S+) (%d+)(.*)$')
    if named == IN_LINE and their_epoch == epoch then -- with changes, such as added webhooks
      redis.call('SET', key, start .. entry .. ' ' .. their_epoch .. rest, 'KEEPTTL')
      return id, entry, 3
    end
    redis.call('SET', key, before, 'KEEPTTL')
  elseif redis.call('EXISTS', key_of(stream, 'run', id)) == 0 then -- a lost record; a cancelled task has a checkpoint
    redis.call('SET', key, record, 'PX', life)
    return id, entry, 4
  end
  redis.call('XDEL', stream, entry)
  return id, nil, 4
end

-- Moves tasks from a line into the stream; those that are over are dropped. With a limit of bytes, no more is read once
-- it is reached.
-- Returns the number of elements that were taken, 1 if the line is empty now else 0, the number of commands, and the
-- moved tasks: id, entry, id, entry ...; then the bytes that are left.
local function move(stream, index, line, client, wanted, life, bytes)
  local moved, taken, commands, PAGE = {}, 0, 0, 16
  while wanted > 0 and (not bytes or bytes > 0) do
    local page = bytes and math.min(wanted, PAGE) or wanted
    local elements = run_on('LPOP', line, page) or {}
    commands, taken = commands + 1, taken + #elements
    local is_empty = #elements < page
    for _, element in ipairs(elements) do
      local id, entry, cost = enqueue(stream, element, life)
      commands = commands + cost
      if bytes then bytes = bytes - #element end
      if entry then
        moved[#moved + 1], moved[#moved + 2] = id, entry
        wanted = wanted - 1
      end
    end
    if is_empty then
      run_on('SREM', index, client)
      return taken, 1, commands + 1, moved, bytes
    end
  end
  return taken, 0, commands, moved, bytes
end

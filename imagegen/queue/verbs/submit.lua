-- Enqueues tasks, or returns the records that exist.
--
-- The entry is added first, so that the record can name it. If the task exists, the entry is removed before any
-- consumer can read it. A new task costs two commands.
--
-- KEYS    1 stream; then a record for each task
-- ARGV    1 group; 2 capacity of the queue; 3 its limit if the depth is to be measured, else ''; 4 life of a record in
--         ms;
--         then six for each task: epoch, digest, entry JSON, record JSON, the epoch to replace, finished or without an
--         entry, or '' (a failed or cancelled task is always replaced), schema version
-- result  depth or -1; then for each task a list of four: kind, entry id, epoch, existing record
--         kind: 'new', 'again' (it replaced an earlier epoch), 'known' (it exists), 'full', 'collision' (another
--         request has this id), 'newer' (of a later schema version), 'gone' (unfinished and without an entry)
local stream, capacity, depth = KEYS[1], tonumber(ARGV[2]), -1
if ARGV[3] ~= '' then
  local pending = redis.pcall('XPENDING', stream, ARGV[1])
  depth = redis.call('XLEN', stream) - (pending.err and 0 or pending[1])
  capacity = tonumber(ARGV[3]) - depth
end

local function head(state, entry, epoch, digest)
  return '1 ' .. state .. ' ' .. entry .. ' ' .. epoch .. ' ' .. epoch .. ' ' .. digest .. '\n'
end

local function add(version, epoch, entry_json)
  return redis.call('XADD', stream, '*', 'v', version, 'g', epoch, 'd', entry_json)
end

-- Returns the kind of reply for an existing record; or nil and the epoch of the new submit, if it replaces the record.
local function judge(existing, epoch, digest, replaced, version)
  local own_epoch = tonumber(epoch)
  if type(existing) == 'table' then return nil, own_epoch end -- of another type: it is overwritten
  local their_version, state, their_entry, their_epoch, sequence, their_digest =
    string.match(existing, '^(%d+) (%l+) (%S+) (%d+) (%d+) (%x+)[ +]*\n')
  if tonumber(their_version or string.match(existing, '^(%d%d?) %l') or 0) > tonumber(version) then return 'newer' end
  if not state then return nil, own_epoch end -- unreadable
  if their_digest ~= digest then return 'collision' end
  if their_epoch == epoch then return 'new' end
  -- An unfinished task without an entry, as after the stream was deleted, would never run: it is replaced, but only
  -- after an instance that runs it had time to restore the entry.
  local unfinished = state == 'pending' or state == 'processing'
  local row = unfinished and redis.pcall('XRANGE', stream, their_entry, their_entry)
  if row and not row.err and #row == 1 then return 'known' end
  if unfinished and replaced ~= their_epoch then return 'gone' end
  if state == 'completed' and replaced ~= their_epoch then return 'known' end
  return nil, math.max(tonumber(epoch), tonumber(sequence) + 1)
end

local results = {}
for i = 0, #KEYS - 2 do
  local record, at = KEYS[i + 2], 5 + i * 6
  local epoch, digest, entry_json, record_json, replaced, version =
    ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], ARGV[at + 5]
  local entry, existing
  if capacity > 0 then
    entry = add(version, epoch, entry_json)
    existing = redis.pcall('SET', record, head('pending', entry, epoch, digest) .. record_json,
      'NX', 'GET', 'PX', ARGV[4])
  else
    existing = redis.pcall('GET', record)
  end
  if not existing then
    results[i + 1] = entry and {'new', entry, epoch, ''} or {'full', '', '', ''}
  else
    local kind, new_epoch = judge(existing, epoch, digest, replaced, version)
    if entry then redis.call('XDEL', stream, entry) end
    if kind then
      results[i + 1] = {kind, '', epoch, type(existing) == 'table' and '' or existing}
    elseif capacity <= 0 then
      results[i + 1] = {'full', '', '', ''}
    else
      epoch = string.format('%.0f', new_epoch)
      entry = add(version, epoch, entry_json)
      redis.call('SET', record, head('pending', entry, epoch, digest) .. record_json, 'PX', ARGV[4])
      results[i + 1] = {'again', entry, epoch, ''}
    end
  end
  if results[i + 1][2] ~= '' then capacity = capacity - 1 end
end
return {depth, results}

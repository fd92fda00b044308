-- Restores claims if Redis has lost their record, entry, pending entry or checkpoint. A claim that another instance
-- took over, and a task that was finished or submitted again, are left alone.
--
-- The entry of a restored claim can be delivered once more to any consumer, since the group has not read past it. The
-- checkpoint shows that consumer who owns the task.
--
-- KEYS    1 stream; then two for each task: record, checkpoint
-- ARGV    1 group; 2 consumer; 3 life of a checkpoint in ms; 4 life of an unfinished record in ms; then seven for each
--         task: entry id, epoch, digest, schema version, entry JSON, record JSON, last checkpoint JSON or ''
-- result  three for each task: 'held' (nothing was missing), 'restored' or 'lost'; its entry id; its checkpoint or ''
local stream, group, consumer, checkpoint_ttl, record_ttl = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local owner = '"owner":"' .. consumer .. '"'
local results = {}
redis.pcall('XGROUP', 'CREATE', stream, group, '0', 'MKSTREAM')

-- Returns the record's state, entry and epoch; nil if it is of an older epoch, or unreadable.
local function current_record(existing, epoch)
  if type(existing) ~= 'string' then return nil end
  local state, entry, their_epoch = string.match(existing, '^%d+ (%l+) (%S+) (%d+) ')
  if not state or tonumber(their_epoch) < tonumber(epoch) then return nil end
  return state, entry, their_epoch
end

local function restore(record_key, checkpoint_key, at)
  local entry, epoch, digest, version = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local existing, checkpoint = redis.pcall('GET', record_key), redis.pcall('GET', checkpoint_key)
  local state, their_entry, their_epoch = current_record(existing, epoch)
  if state and (their_epoch ~= epoch or (state ~= 'pending' and state ~= 'processing')) then
    return 'lost', entry, ''
  end
  local checkpoint_entry, checkpoint_json
  if type(checkpoint) == 'string' then checkpoint_entry, checkpoint_json = string.match(checkpoint, '^(%S+) (.*)$') end
  if checkpoint_entry and older(checkpoint_entry, entry) then checkpoint_entry, checkpoint_json = nil, nil end
  local ours = checkpoint_json and (string.find(checkpoint_json, owner, 1, true) or checkpoint_json == ARGV[at + 6])
  -- The checkpoint of a released claim has no owner: the next consumer continues from it.
  local released = checkpoint_json and not ours and string.find(checkpoint_json, '"phase":"released"', 1, true)

  local current
  if state and their_entry ~= entry and exists(stream, their_entry) then
    current = their_entry
  elseif exists(stream, entry) then
    current = entry
  end
  local holder
  if current then
    local rows = redis.call('XPENDING', stream, group, current, current, 1)
    holder = rows[1] and rows[1][2]
  end
  if holder ~= consumer then
    -- Another instance has started it, or holds what we have not started.
    if checkpoint_json and not ours and not released then return 'lost', entry, '' end
    if holder and (not checkpoint_json or released) and ARGV[at + 6] == '' then return 'lost', entry, '' end
  end

  local kind = 'held'
  if not current then current = redis.call('XADD', stream, '*', 'v', version, 'g', epoch, 'd', ARGV[at + 4]) end
  if holder ~= consumer then
    kind = 'restored'
    redis.call('XCLAIM', stream, group, consumer, 0, current, 'FORCE', 'JUSTID')
  end
  if not state then
    kind = 'restored'
    redis.call('SET', record_key, waiting_record(version, current, epoch, digest, ARGV[at + 5]), 'PX', record_ttl)
  elseif their_entry ~= current then
    redis.call('SET', record_key, with_entry(existing, current), 'KEEPTTL')
  end
  if released then
    if checkpoint_entry ~= current then
      redis.call('SET', checkpoint_key, current .. ' ' .. checkpoint_json, 'KEEPTTL')
    end
    return kind, current, ''
  end
  local json = checkpoint_json or ARGV[at + 6]
  if ours and string.find(ARGV[at + 6], owner, 1, true) then json = ARGV[at + 6] end -- Redis may have an earlier one
  if json == '' then return kind, current, '' end
  if json ~= checkpoint_json or checkpoint_entry ~= current or (holder and holder ~= consumer) then
    -- The bytes differ from before: an instance that has read the checkpoint must not find it unchanged at its start.
    kind, json = 'restored', json .. ' '
    redis.call('SET', checkpoint_key, current .. ' ' .. json, 'PX', checkpoint_ttl)
  end
  return kind, current, current .. ' ' .. json
end

for i = 0, (#KEYS - 1) / 2 - 1 do
  for _, value in ipairs({restore(KEYS[i * 2 + 2], KEYS[i * 2 + 3], 5 + i * 7)}) do results[#results + 1] = value end
end
return results

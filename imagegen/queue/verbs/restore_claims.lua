-- Restores claims whose record, entry, pending entry or run Redis has lost. A claim that another instance took over, and
-- a task that was finished or submitted again, are left alone.
--
-- A restored claim's entry can be delivered once more to any consumer, since the group has not read past it. Its run is
-- there then, so that whoever starts it finds that it is ours.
--
-- KEYS  1 stream; then two a task: record, run
-- ARGV  1 group; 2 consumer; 3 life of a run in ms; 4 life of an unfinished record in ms; then seven a task: entry id,
--       epoch, digest, schema version, entry JSON, record JSON, run JSON as it stood or '' if none was written
-- returns three a task: 'held' (nothing was missing), 'restored' or 'lost'; its entry id; its run, '' if there is none
local stream, group, consumer, run_life, record_life = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local owner = '"owner":"' .. consumer .. '"'
local answers = {}
redis.pcall('XGROUP', 'CREATE', stream, group, '0', 'MKSTREAM')

-- The record's state, entry and epoch; nil where it is of an older epoch, or none.
local function current_record(known, epoch)
  if type(known) ~= 'string' then return nil end
  local state, entry, theirs = string.match(known, '^%d+ (%l+) (%S+) (%d+) ')
  if not state or tonumber(theirs) < tonumber(epoch) then return nil end
  return state, entry, theirs
end

local function restore(record_key, run_key, at)
  local entry, epoch, digest, version = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local known, run = redis.pcall('GET', record_key), redis.pcall('GET', run_key)
  local state, their_entry, their_epoch = current_record(known, epoch)
  if state and (their_epoch ~= epoch or (state ~= 'pending' and state ~= 'processing')) then
    return 'lost', entry, ''
  end
  local run_entry, run_json
  if type(run) == 'string' then run_entry, run_json = string.match(run, '^(%S+) (.*)$') end
  if run_entry and older(run_entry, entry) then run_entry, run_json = nil, nil end
  local ours = run_json and (string.find(run_json, owner, 1, true) or run_json == ARGV[at + 6])
  -- The run of a claim that was handed back is nobody's: who starts it adopts it.
  local released = run_json and not ours and string.find(run_json, '"phase":"released"', 1, true)

  local now
  if state and their_entry ~= entry and exists(stream, their_entry) then
    now = their_entry
  elseif exists(stream, entry) then
    now = entry
  end
  local holder
  if now then
    local rows = redis.call('XPENDING', stream, group, now, now, 1)
    holder = rows[1] and rows[1][2]
  end
  if holder ~= consumer then
    -- Another instance has started it, or holds what we have not started.
    if run_json and not ours and not released then return 'lost', entry, '' end
    if holder and (not run_json or released) and ARGV[at + 6] == '' then return 'lost', entry, '' end
  end

  local kind = 'held'
  if not now then now = redis.call('XADD', stream, '*', 'v', version, 'g', epoch, 'd', ARGV[at + 4]) end
  if holder ~= consumer then
    kind = 'restored'
    redis.call('XCLAIM', stream, group, consumer, 0, now, 'FORCE', 'JUSTID')
  end
  if not state then
    kind = 'restored'
    redis.call('SET', record_key, waiting_record(now, epoch, digest, ARGV[at + 5]), 'PX', record_life)
  elseif their_entry ~= now then
    redis.call('SET', record_key, with_entry(known, now), 'KEEPTTL')
  end
  if released then
    if run_entry ~= now then redis.call('SET', run_key, now .. ' ' .. run_json, 'KEEPTTL') end
    return kind, now, ''
  end
  local json = run_json or ARGV[at + 6]
  if json == '' then return kind, now, '' end
  if not run_json or run_entry ~= now or (holder and holder ~= consumer) then
    -- Other bytes than before: one that read the run, and has not started, must not take it for unchanged.
    kind, json = 'restored', json .. ' '
    redis.call('SET', run_key, now .. ' ' .. json, 'PX', run_life)
  end
  return kind, now, now .. ' ' .. json
end

for i = 0, (#KEYS - 1) / 2 - 1 do
  for _, value in ipairs({restore(KEYS[i * 2 + 2], KEYS[i * 2 + 3], 5 + i * 7)}) do answers[#answers + 1] = value end
end
return answers

-- Queues waiting tasks again whose entry or record Redis has lost. A task that an instance runs is left to it.
--
-- KEYS  1 stream; then two a task: record, run
-- ARGV  1 life of an unfinished record in ms, '' to change nothing; 2 the rest of its life in ms at which a run's owner is
--       gone; then six a task: entry id, epoch, digest, schema version, entry JSON, record JSON
-- returns three a task: 'queued' (a new entry, or a new record for its entry), 'missing' (the same, but for ARGV 1),
--         'there' (nothing was missing), 'runs' or 'over' (finished, or submitted again); its entry id; 1 if its record
--         was missing
local stream, answers = KEYS[1], {}

local function requeue(record_key, run_key, at)
  local entry, epoch, digest, version = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local known = redis.pcall('GET', record_key)
  if type(known) == 'table' then return 'over', entry, 0 end
  local missing = known and 0 or 1
  local their_version, state, their_entry, theirs
  if known then
    their_version, state, their_entry, theirs = string.match(known, '^(%d+) (%l+) (%S+) (%d+) ')
    if not state or tonumber(their_version) > tonumber(version) then return 'over', entry, 0 end
    local unfinished = state == 'pending' or state == 'processing'
    if tonumber(theirs) > tonumber(epoch) or (theirs == epoch and not unfinished) then
      return 'over', entry, 0
    end
    if theirs ~= epoch then
      known = nil
    elseif exists(stream, their_entry) then
      return 'there', their_entry, 0
    end
  end

  local now = exists(stream, entry) and entry
  if not now then
    local run, run_entry, run_json = redis.pcall('GET', run_key), nil, nil
    if type(run) == 'string' then run_entry, run_json = string.match(run, '^(%S+) (.*)$') end
    if run_entry and older(run_entry, known and their_entry or entry) then run_json = nil end
    local released = run_json and string.find(run_json, '"phase":"released"', 1, true)
    if run_json and not released and redis.call('PTTL', run_key) > tonumber(ARGV[2]) then
      return 'runs', entry, missing
    end
    if ARGV[1] == '' then return 'missing', entry, missing end
    now = redis.call('XADD', stream, '*', 'v', version, 'g', epoch, 'd', ARGV[at + 4])
    if run_json then redis.call('SET', run_key, now .. ' ' .. run_json, 'KEEPTTL') end
  end
  if ARGV[1] == '' then return 'missing', entry, missing end
  if known then
    redis.call('SET', record_key, with_entry(known, now), 'KEEPTTL')
  else
    redis.call('SET', record_key, waiting_record(now, epoch, digest, ARGV[at + 5]), 'PX', ARGV[1])
  end
  return 'queued', now, missing
end

for i = 0, (#KEYS - 1) / 2 - 1 do
  for _, value in ipairs({requeue(KEYS[i * 2 + 2], KEYS[i * 2 + 3], 3 + i * 6)}) do answers[#answers + 1] = value end
end
return answers

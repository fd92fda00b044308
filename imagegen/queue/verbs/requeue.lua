-- Queues waiting tasks again if Redis has lost their entry, line or record: a task that waited in a line waits there
-- again. A task that an instance runs is left to it.
--
-- KEYS    1 stream; 2 index of the lines; then three for each task: record, checkpoint, line of its client
-- ARGV    1 life of an unfinished record in ms, '' to change nothing; 2 remaining life of a checkpoint in ms at which
--         its owner is gone; 3 highest schema version that is readable; then nine for each task: entry id, epoch,
--         digest, schema version, entry JSON, record JSON, client, task id, 1 if its line lacks it, else 0
-- result  three for each task: a kind; its entry id; 1 if its record was missing, else 0
--         kind: 'queued' (with a new entry, or a new record for its entry), 'missing' (the same, if ARGV 1 is ''),
--         'there' (nothing was missing), 'line' (the same, if its line has it), 'runs' (an instance runs it), 'over'
--         (finished, or submitted again)
local stream, results, MAX_SKEW_MS = KEYS[1], {}, 5000

local function requeue(record_key, checkpoint_key, line, at)
  local entry, epoch, digest, version = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local existing = redis.pcall('GET', record_key)
  if type(existing) == 'table' then return 'over', entry, 0 end
  local missing = existing and 0 or 1
  local their_version, state, their_entry, their_epoch
  if existing then
    their_version, state, their_entry, their_epoch = string.match(existing, '^(%d+) (%l+) (%S+) (%d+) ')
    if not state or tonumber(their_version) > tonumber(ARGV[3]) then return 'over', entry, 0 end
    local unfinished = state == 'pending' or state == 'processing'
    if tonumber(their_epoch) > tonumber(epoch) or (their_epoch == epoch and not unfinished) then
      return 'over', entry, 0
    end
    if their_epoch ~= epoch then
      existing = nil
    elseif exists(stream, their_entry) then
      return 'there', their_entry, 0
    elseif their_entry == IN_LINE and ARGV[at + 8] == '0' then
      return 'line', IN_LINE, 0
    end
  end

  local current = exists(stream, entry) and entry
  if not current then
    local checkpoint, checkpoint_entry, checkpoint_json = redis.pcall('GET', checkpoint_key), nil, nil
    if type(checkpoint) == 'string' then
      checkpoint_entry, checkpoint_json = string.match(checkpoint, '^(%S+) (.*)$')
    end
    local named = existing and their_entry or entry
    if named == IN_LINE then named = string.format('%.0f-0', epoch / 1000 - MAX_SKEW_MS) end
    if checkpoint_entry and older(checkpoint_entry, named) then checkpoint_json = nil end
    local released = checkpoint_json and string.find(checkpoint_json, '"phase":"released"', 1, true)
    if checkpoint_json and not released and redis.call('PTTL', checkpoint_key) > tonumber(ARGV[2]) then
      return 'runs', entry, missing
    end
    if ARGV[1] == '' then return 'missing', entry, missing end
    if entry == IN_LINE and not checkpoint_json then
      current = IN_LINE
      local element = element_of(version, epoch, digest, ARGV[at + 7], ARGV[at + 5], ARGV[at + 4])
      push(KEYS[2], line, ARGV[at + 6], {element})
    else
      current = redis.call('XADD', stream, '*', 'v', version, 'g', epoch, 'd', ARGV[at + 4])
    end
    if checkpoint_json then redis.call('SET', checkpoint_key, current .. ' ' .. checkpoint_json, 'KEEPTTL') end
  end
  if ARGV[1] == '' then return 'missing', entry, missing end
  if existing then
    redis.call('SET', record_key, with_entry(existing, current), 'KEEPTTL')
  else
    redis.call('SET', record_key, waiting_record(version, current, epoch, digest, ARGV[at + 5]), 'PX', ARGV[1])
  end
  return 'queued', current, missing
end

for i = 0, (#KEYS - 2) / 3 - 1 do
  local values = {requeue(KEYS[i * 3 + 3], KEYS[i * 3 + 4], KEYS[i * 3 + 5], 4 + i * 9)}
  for _, value in ipairs(values) do results[#results + 1] = value end
end
return results

-- Writes the checkpoint of a task that another instance may hold, or may have started before, if the entry is pending
-- for this consumer. The count of calls that may have been paid twice goes into the record too, where `finish`
-- finds it, and with it what the task costs.
--
-- A task may have a second entry: a stream that was lost and written back, and then came back itself. The entry that
-- was started first counts, else the one that the record names; the other one is deleted.
--
-- KEYS    1 stream; 2 record; 3 checkpoint
-- ARGV    1 group; 2 consumer; 3 entry id; 4 epoch; 5 life of a checkpoint in ms; 6 expected checkpoint, '' for none;
--         7 checkpoint to write; 8 count of calls that may have been paid twice; 9 JSON of the cost, or ''
-- result  a kind; the other checkpoint or ''; number of commands, without the script call
--         kind: '' (written), 'lost' (another instance holds the task), 'other' (another checkpoint is there)
local entry, epoch, life, expected, value, count, cost = unpack(ARGV, 3)
local stream, commands = KEYS[1], 2
local pending = redis.pcall('XPENDING', stream, ARGV[1], entry, entry, 1)
local record = redis.pcall('GET', KEYS[2])
if type(record) ~= 'string' then record = '' end
local state, named_entry, their_epoch = string.match(record, '^%d+ (%l+) (%S+) (%d+) ')
local unfinished = state == 'pending' or state == 'processing'
if pending.err or #pending == 0 then -- finished, or the server lost its data: then no other instance has it
  if state and not (unfinished and named_entry == entry and their_epoch == epoch) then return {'lost', '', 2} end
elseif pending[1][2] ~= ARGV[2] then
  return {'lost', '', 2}
elseif state then
  local started = string.match(expected, '^(%S+) ')
  local is_second = tonumber(their_epoch) > tonumber(epoch) or (their_epoch == epoch and not unfinished)
  if not is_second and started and started ~= entry then
    commands = commands + 1
    is_second = exists(stream, started)
    if is_second and their_epoch == epoch and named_entry == entry then
      redis.call('SET', KEYS[2], with_entry(record, started), 'KEEPTTL')
      commands = commands + 1
    elseif not is_second and older(entry, started) then
      return {'lost', '', commands}
    end
  end
  if not is_second and their_epoch == epoch and named_entry ~= entry then
    commands = commands + 1
    is_second = exists(stream, named_entry)
  end
  if is_second then
    redis.call('XDEL', stream, entry)
    redis.call('XACK', stream, ARGV[1], entry)
    return {'lost', '', commands + 2}
  end
end
local checkpoint = redis.pcall('GET', KEYS[3])
if type(checkpoint) == 'string' and checkpoint ~= expected and checkpoint ~= value then
  return {'other', checkpoint, commands + 1}
end
redis.call('SET', KEYS[3], value, 'PX', life)
count = tonumber(count)
if count > 0 and string.match(record, '^%d+ %l+ %S+ (%d+) ') == epoch and billed_in(record) <= count then
  local changed = with_cost(with_billed(record, count), cost)
  if changed == record then return {'', '', commands + 2} end
  redis.call('SET', KEYS[2], changed, 'KEEPTTL')
  return {'', '', commands + 3}
end
return {'', '', commands + 2}

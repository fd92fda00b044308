-- Writes the checkpoint of a task that another instance may hold, or may have started before, if the entry is pending
-- for this consumer. The count of calls that may have been paid twice goes into the record too, where `finish`
-- finds it.
--
-- KEYS    1 stream; 2 record; 3 checkpoint
-- ARGV    1 group; 2 consumer; 3 entry id; 4 epoch; 5 life of a checkpoint in ms; 6 expected checkpoint, '' for none;
--         7 checkpoint to write; 8 count of calls that may have been paid twice
-- result  a kind; the other checkpoint or ''; number of commands, without the script call
--         kind: '' (written), 'lost' (another instance holds the task), 'other' (another checkpoint is there)
local entry, epoch, life, expected, value, count = unpack(ARGV, 3)
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], entry, entry, 1)
local record = redis.pcall('GET', KEYS[2])
if type(record) ~= 'string' then record = '' end
if pending.err or #pending == 0 then -- finished, or the server lost its data: then no other instance has it
  local state, named_entry, their_epoch = string.match(record, '^%d+ (%l+) (%S+) (%d+) ')
  local unfinished = state == 'pending' or state == 'processing'
  if state and not (unfinished and named_entry == entry and their_epoch == epoch) then return {'lost', '', 2} end
elseif pending[1][2] ~= ARGV[2] then
  return {'lost', '', 2}
end
local checkpoint = redis.pcall('GET', KEYS[3])
if type(checkpoint) == 'string' and checkpoint ~= expected and checkpoint ~= value then
  return {'other', checkpoint, 3}
end
redis.call('SET', KEYS[3], value, 'PX', life)
count = tonumber(count)
if count > 0 and string.match(record, '^%d+ %l+ %S+ (%d+) ') == epoch and billed_in(record) < count then
  redis.call('SET', KEYS[2], with_billed(record, count), 'KEEPTTL')
  return {'', '', 5}
end
return {'', '', 4}

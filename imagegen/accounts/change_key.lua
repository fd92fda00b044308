-- Replaces the record of one API key if it is still the expected one, and gives a new name a budget slot.
--
-- KEYS    1 hash of the API keys: `key:<name>`, `slot:<name>`, `slots` (the highest), `version` (rises with each change)
-- ARGV    1 name; 2 the expected record, '' for none; 3 the new record, '' to remove it
-- result  the record that is there instead of the expected one; false if the change was made, now or by an earlier call
local keys, field = KEYS[1], 'key:' .. ARGV[1]
local existing = redis.call('HGET', keys, field) or ''
if existing == ARGV[3] then return false end
if existing ~= ARGV[2] then return existing end
count_change(keys)
if ARGV[3] == '' then
  redis.call('HDEL', keys, field)
else
  redis.call('HSET', keys, field, ARGV[3])
  if not has_slot(keys, ARGV[1]) then give_slot(keys, ARGV[1]) end
end
return false

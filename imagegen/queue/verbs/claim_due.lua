-- Claims outbox entries that are due and postpones them, so that no other instance claims them at the same time.
--
-- KEYS    1 outbox
-- ARGV    1 highest due time, Unix ms or '+inf'; 2 the new due time, Unix ms; 3 maximum of entries
-- result  their names
local names = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])
local due = {}
for _, name in ipairs(names) do
  due[#due + 1] = ARGV[2]
  due[#due + 1] = name
end
if #due > 0 then redis.call('ZADD', KEYS[1], 'XX', unpack(due)) end
return names

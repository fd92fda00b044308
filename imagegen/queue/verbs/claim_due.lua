-- Takes over what fell due in the outbox, so that no other instance takes it at the same time.
--
-- KEYS  1 outbox
-- ARGV  1 the highest due time that counts, Unix ms or '+inf'; 2 when it falls due again; 3 how many at most
-- returns their names
local names = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])
local due = {}
for _, name in ipairs(names) do
  due[#due + 1] = ARGV[2]
  due[#due + 1] = name
end
if #due > 0 then redis.call('ZADD', KEYS[1], 'XX', unpack(due)) end
return names

-- Counts a task among the unfinished ones of its client, unless the client has as many as it may.
--
-- KEYS  1 sorted set of task ids, by the Unix ms of their submit
-- ARGV  1 task id; 2 limit; 3 Unix ms; 4 life of the set in ms; 5 how many to return; then ids that no longer count
-- returns 1 if the task counts from now on, 0 if it did before, else the oldest ids with their times
local open, id = KEYS[1], ARGV[1]
if #ARGV > 5 then redis.call('ZREM', open, unpack(ARGV, 6)) end
if redis.call('ZSCORE', open, id) then return 0 end
if redis.call('ZCARD', open) < tonumber(ARGV[2]) then
  redis.call('ZADD', open, ARGV[3], id)
  redis.call('PEXPIRE', open, ARGV[4])
  return 1
end
return redis.call('ZRANGE', open, 0, tonumber(ARGV[5]) - 1, 'WITHSCORES')

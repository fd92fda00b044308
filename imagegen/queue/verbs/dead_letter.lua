-- Takes an entry that nobody can read out of the stream, and keeps it for people to look at.
--
-- KEYS  1 stream; 2 dead list
-- ARGV  1 group; 2 entry id; 3 what it held; 4 life of the list in seconds
if redis.call('XDEL', KEYS[1], ARGV[2]) == 1 then
  redis.call('LPUSH', KEYS[2], ARGV[3])
  redis.call('LTRIM', KEYS[2], 0, 99)
  redis.call('EXPIRE', KEYS[2], ARGV[4])
end
return redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])

-- Moves an unreadable entry from the stream to the dead-letter list.
--
-- KEYS    1 stream; 2 dead-letter list
-- ARGV    1 group; 2 entry id; 3 content of the entry; 4 life of the list in seconds
-- result  1 if the entry was pending, else 0
if redis.call('XDEL', KEYS[1], ARGV[2]) == 1 then
  redis.call('LPUSH', KEYS[2], ARGV[3])
  redis.call('LTRIM', KEYS[2], 0, 99)
  redis.call('EXPIRE', KEYS[2], ARGV[4])
end
return redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])

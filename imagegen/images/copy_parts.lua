-- Copies the parts of an image under other names.
--
-- KEYS    two for each part: its key, the key of the copy
-- ARGV    1 end of the copies in Unix ms
-- result  1 if all were copied, 0 if one is gone or was not copied, -1 if the server or the user may not copy
for i = 1, #KEYS, 2 do
  local copied = redis.pcall('COPY', KEYS[i], KEYS[i + 1], 'REPLACE')
  if type(copied) == 'table' then
    local text = copied.err or ''
    local refused = text:find('NOPERM') or text:find('permission') or text:find('The user') or text:find('nknown')
    return refused and -1 or 0
  end
  if copied == 0 then return 0 end
  redis.call('PEXPIREAT', KEYS[i + 1], ARGV[1])
end
return 1
